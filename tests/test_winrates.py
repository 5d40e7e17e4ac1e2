"""Win rates equal the public tools' on fixed files, and their intervals mean what they say."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from sgpo_cli import arena_hard, winrates

FIXTURE = json.loads((Path(__file__).parent / "data" / "winrates.json").read_text())
EXPECTED = FIXTURE["expected"]
STYLES = FIXTURE["arena"]["styles"]
BASELINE = "o3-mini-2025-01-31"


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winrates, "RESAMPLES", 200)


def annotations() -> tuple[Any, Any, Any, Any]:
    """Preferences in 0..1, lengths of the model's and the baseline's answers, difficulties."""
    preference, baseline, model, difficulty = np.array(FIXTURE["alpaca"]["rows"], float).T
    return preference - 1, model, baseline, difficulty


class TestAlpacaEval:
    def test_the_raw_win_rate_is_theirs(self) -> None:
        preferences, lengths, baseline_lengths, _ = annotations()
        found = winrates.summary(preferences, lengths, baseline_lengths, seed=1)
        assert 100 * found["win_rate"] == pytest.approx(EXPECTED["alpaca_eval"]["win_rate"], abs=1e-9)

    def test_the_minimal_model_is_that_of_a_glm_and_near_theirs(self) -> None:
        found = 100 * winrates.length_controlled(*annotations()[:3])
        assert found == pytest.approx(EXPECTED["alpaca_eval"]["statsmodels_minimal"], abs=1e-6)
        assert found == pytest.approx(EXPECTED["alpaca_eval"]["length_controlled_minimal"], abs=0.2)

    def test_with_difficulty_it_is_that_of_a_glm_and_near_theirs(self) -> None:
        preferences, lengths, baseline_lengths, difficulty = annotations()
        official = winrates.Official(difficulty)
        found = 100 * winrates.length_controlled(preferences, lengths, baseline_lengths, official)
        assert found == pytest.approx(EXPECTED["alpaca_eval"]["statsmodels_noreg"], abs=1e-6)
        assert found == pytest.approx(EXPECTED["alpaca_eval"]["length_controlled_noreg"], abs=0.2)

    def test_with_the_gamed_baselines_it_is_near_theirs(self) -> None:
        preferences, lengths, baseline_lengths, difficulty = annotations()
        official = winrates.Official(difficulty, np.array(FIXTURE["alpaca"]["gamed"], float))
        found = 100 * winrates.length_controlled(preferences, lengths, baseline_lengths, official)
        assert found == pytest.approx(EXPECTED["alpaca_eval"]["length_controlled_v1"], abs=0.2)


def battles(names: list[str]) -> arena_hard.Battles:
    games = []
    for number, name in enumerate(names):
        for prompt, labels in enumerate(FIXTURE["arena"]["games"][name]):
            if None in labels:
                continue
            style = arena_hard.style_difference(metadata(name, prompt), metadata(BASELINE, prompt))
            for label, model_is_a in zip(labels, (False, True), strict=True):
                first_won, copies = arena_hard.outcome_of(label) or (math.nan, 0)
                games.append([number, prompt, first_won if model_is_a else 1 - first_won, copies, *style])
    table = np.array(games, float)
    return arena_hard.Battles(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2], table[:, 3], table[:, 4:])


def metadata(name: str, prompt: int) -> dict[str, Any]:
    length, headers, lists, bold = STYLES[name][prompt]
    return {"token_len": length, "header_count": headers, "list_count": lists, "bold_count": bold}


@pytest.mark.usefixtures("few_resamples")
class TestArenaHard:
    def test_without_style_control_it_is_their_mean(self) -> None:
        found = arena_hard.scores(battles(["one", "two"]), 2, seed=1, control=())
        for name, (score, _) in zip(("one", "two"), found, strict=True):
            assert 100 * score == pytest.approx(EXPECTED["arena_hard"]["mean"][name], abs=1e-9)
            for printed in EXPECTED["arena_hard"]["printed_plain"]:
                assert 100 * score == pytest.approx(printed[name], abs=0.5)  # the mean of 100 resamples

    def test_with_style_control_it_is_their_model(self) -> None:
        found = arena_hard.scores(battles(["one", "two"]), 2, seed=1)
        for name, (score, (low, high)) in zip(("one", "two"), found, strict=True):
            assert 100 * score == pytest.approx(EXPECTED["arena_hard"]["fit_converged"][name], abs=1e-3)
            # Their optimizer stops after 50 steps, a little before the maximum; then resamples are drawn.
            assert 100 * score == pytest.approx(EXPECTED["arena_hard"]["fit_as_is"][name], abs=0.3)
            for printed in EXPECTED["arena_hard"]["printed_style_control"]:
                assert 100 * score == pytest.approx(printed[name], abs=0.6)
            assert low < score < high

    def test_controlling_for_one_kind_of_style_controls_for_that_kind(self) -> None:
        """The published script slices the models' columns here; a length-loving judge shows the difference."""
        whole, length, markdown, none = (
            arena_hard.scores(battles(["one"]), 1, 1, control)[0][0]
            for control in (("length", "markdown"), ("length",), ("markdown",), ())
        )
        assert len({round(score, 6) for score in (whole, length, markdown, none)}) == 4
        assert abs(length - whole) < abs(none - whole)

    def test_resampling_prompts_gives_wider_intervals_than_resampling_games(self) -> None:
        together = battles(["one"])
        apart = arena_hard.Battles(
            together.model, np.arange(len(together.model)), together.outcome, together.copies, together.style
        )
        widths = [high - low for fight in (together, apart) for _, (low, high) in arena_hard.scores(fight, 1, 1, ())]
        assert widths[0] > widths[1]

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            ("A>>B", (1, 3)),
            ("A>B", (1, 1)),
            ("A=B", (0.5, 1)),
            ("B>A", (0, 1)),
            ("B>>A", (0, 3)),
            ("A<<B", (0, 3)),
            ("B<A", (1, 1)),
            ("A", None),
            ("A>A", None),
            ("A>B>C", None),
            ("", None),
        ],
    )
    def test_labels(self, label: str, expected: tuple[float, int] | None) -> None:
        assert arena_hard.outcome_of(label) == expected

    def test_style_is_counted_outside_of_code(self) -> None:
        text = "# Title\n\n- one\n- **two**\n1. three\n\n```\n# no header\n- no item\n```\n__four__"
        style = arena_hard.style_of(text)
        assert style["header_count"]["h1"] == 1
        assert style["list_count"] == {"ordered": 1, "unordered": 2}
        assert style["bold_count"] == {"**": 1, "__": 1}


class TestRates:
    def test_ties_count_half_and_invalid_verdicts_not_at_all(self) -> None:
        preferences = np.array([1, 1, 0, 0.5, math.nan])
        found = winrates.summary(preferences, np.ones(5), np.ones(5), seed=1)
        assert found["win_rate"] == 2.5 / 4
        assert found["lc_win_rate"] == pytest.approx(2.5 / 4, abs=1e-6)
        assert [found[name] for name in ("wins", "losses", "ties", "invalid", "n")] == [2, 1, 1, 1, 5]

    def test_no_valid_verdict_gives_no_rate(self) -> None:
        found = winrates.summary(np.full(3, math.nan), np.ones(3), np.ones(3), seed=1)
        assert found["win_rate"] is found["ci95"] is found["lc_win_rate"] is None
        assert found["invalid"] == 3

    def test_a_length_difference_that_never_varies_cannot_be_controlled_for(self) -> None:
        found = winrates.summary(np.array([1.0, 0, 1]), np.full(3, 9.0), np.full(3, 5.0), seed=1)
        assert found["win_rate"] is not None
        assert found["lc_win_rate"] is None

    def test_a_model_that_always_wins_has_a_rate_of_one(self) -> None:
        lengths = np.arange(50, dtype=float)
        found = winrates.summary(np.ones(50), lengths, lengths[::-1].copy(), seed=1)
        assert found["win_rate"] == 1
        assert found["lc_win_rate"] == pytest.approx(1, abs=1e-6)

    def test_the_seed_decides_the_interval(self) -> None:
        data = annotations()[:3]
        first, again, other = (winrates.summary(*data, seed=seed)["ci95"] for seed in (1, 1, 2))
        assert first == again != other

    def test_resampling_in_parts_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.random.default_rng(3).random(90)
        whole = winrates.mean_interval(values, 7)
        monkeypatch.setattr(winrates, "CELLS", 1000)
        assert winrates.mean_interval(values, 7) == whole

    @pytest.mark.parametrize(
        ("wins", "losses", "p"), [(8, 2, 0.109375), (0, 0, 1), (5, 5, 1), (10, 0, 2 / 1024), (1, 0, 1)]
    )
    def test_the_sign_test_is_exact(self, wins: int, losses: int, p: float) -> None:
        assert winrates.sign_test(wins, losses) == winrates.sign_test(losses, wins) == pytest.approx(p, rel=1e-9)


class TestGames:
    FIRST = np.array([[True, False]])

    @pytest.mark.parametrize(
        ("games", "preference"),
        [
            ((1, 0), 1),  # the model won in both places
            ((0, 1), 0),
            ((1, 1), 0.5),  # the place won
            ((0, 0), 0.5),
            ((1, 0.5), 0.5),
            ((0.5, 0.5), 0.5),
            ((1, math.nan), math.nan),
            ((math.nan, 0), math.nan),
        ],
    )
    def test_agreeing_orders_decide(self, games: tuple[float, float], preference: float) -> None:
        found = winrates.preferences_of(np.array([games]), self.FIRST)
        assert found == pytest.approx([preference], nan_ok=True)

    def test_position_bias_is_seen(self) -> None:
        games = np.array([[1, 1]] * 3 + [[1, 0]])
        found = winrates.position_bias(games, np.tile(self.FIRST, (4, 1)))
        assert found == {"first_position_wins": 7 / 8, "consistency": 1 / 4}


@pytest.mark.usefixtures("few_resamples")
def test_intervals_cover_the_truth_with_a_biased_judge() -> None:
    """A smaller version of benchmarks/winrate_coverage.py, whose JSON has the figures of 400 simulations."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import winrate_coverage

    found = winrate_coverage.measure(simulations=60, prompts=200)
    assert 0.85 <= found["raw"]["coverage"] <= 1
    assert abs(found["length_controlled"]["mean_error_points"]) < 1.5
    assert found["one_order_always"]["coverage"] < 0.5  # what both orders are for


def test_the_committed_coverage_keeps_the_promise() -> None:
    figures = json.loads((ROOT / "benchmarks" / "winrate_coverage.json").read_text())
    assert figures["simulations"] == 400
    assert 0.93 <= figures["raw"]["coverage"] <= 0.97
    assert 0.93 <= figures["length_controlled"]["coverage"] <= 0.97
    assert abs(figures["length_controlled"]["mean_error_points"]) < 1
    readme = (ROOT / "README.md").read_text()
    for name in ("raw", "length_controlled"):
        assert f"{100 * figures[name]['coverage']:.1f} %" in readme
