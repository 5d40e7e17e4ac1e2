"""The guard: its rules on measured cases, what a run does with its verdicts, and its measures on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Sgpo, chat, read_lines, run_stage, sentence, write_lines

from sgpo_cli import guard
from sgpo_cli.errors import UsageError
from sgpo_cli.guard_configs import CheckPairsConfig, CheckPolicyConfig
from sgpo_cli.stages.check_policy import compared

PAIRS = CheckPairsConfig(output_dir="x", dataset="x", policy="x")
POLICY = CheckPolicyConfig(output_dir="x", dataset="x", model="new", previous="old")


def of_pairs(wins: float, ties: float, losses: float, **changed: Any) -> guard.Verdict:
    measures = {
        "by": "judge",
        "wins": round(400 * wins),
        "ties": round(400 * ties),
        "losses": round(400 * losses),
        "prompts": 1500,
        "sample": 400,
        "pairs": 1400,
        "identical": 90,
        "unusable": 10,
        "length_ratio": 1.2,
        "repetitive": {"chosen": 0.0, "rejected": 0.0},
    }
    return guard.of_pairs(measures | changed, PAIRS)


@pytest.mark.parametrize(
    ("shares", "health"),
    [
        ((0.89, 0.06, 0.06), "healthy"),  # 0.43 -> 0.89
        ((0.36, 0.65, 0.00), "healthy"),  # 0.88 -> 0.94
        ((0.16, 0.84, 0.01), "healthy"),  # 0.94 -> 0.96
        ((0.31, 0.45, 0.24), "spent"),  # 0.89 -> 0.80
        ((0.30, 0.58, 0.12), "spent"),  # 0.89 -> 0.90
        ((0.27, 0.63, 0.10), "spent"),  # 0.90 -> 0.87
        ((0.05, 0.04, 0.91), "broken"),  # 0.86 -> 0.01
    ],
)
def test_wins_and_losses_that_were_seen_before_a_policy_rose_stood_or_fell(
    shares: tuple[float, float, float], health: str
) -> None:
    assert of_pairs(*shares).health == health


@pytest.mark.parametrize(
    ("changed", "health", "said"),
    [
        ({"pairs": 20}, "spent", "20 pairs, at least 30 are needed"),
        (
            {"pairs": 60, "identical": 1440},
            "spent",
            "53 of 1500 (3.5%) answers were improved, 1440 came back unchanged",
        ),
        ({"unusable": 700}, "broken", "700 of 1500 (46.7%) pairs were cut"),
        ({"log_prob_gap": -0.53}, "broken", "implausible, by 0.53 nats"),  # an improver with noise on its weights
        ({"length_ratio": 7.0}, "broken", "7.0 times as long"),
        (
            {"repetitive": {"chosen": 0.6, "rejected": 0.1}},
            "broken",
            "240 of 400 (60.0%) chosen texts repeat themselves, 40 of 400",
        ),
    ],
)
def test_what_the_texts_alone_show(changed: dict[str, Any], health: str, said: str) -> None:
    verdict = of_pairs(0.89, 0.06, 0.06, **changed)
    assert verdict.health == health
    assert any(said in reason for reason in verdict.reasons)


def test_what_is_to_be_done_is_about_the_worst_that_was_seen() -> None:
    assert "may be exchanged; if they are not, lower the learning rate" in of_pairs(0.02, 0.02, 0.96).remedy
    assert of_pairs(0.2, 0.2, 0.6).remedy == guard.REMEDIES["broken"]
    assert of_pairs(0.89, 0.06, 0.06, pairs=20, prompts=25, identical=5, unusable=0).remedy == guard.MORE
    assert of_pairs(0.31, 0.45, 0.24).remedy == guard.REMEDIES["spent"]
    assert of_pairs(0.89, 0.06, 0.06, pairs=20, unusable=700).remedy == guard.REMEDIES["broken"]
    assert of_pairs(0.89, 0.06, 0.06).remedy == ""


def test_a_few_bad_answers_are_chance() -> None:
    def answers(bad: int, prompts: int) -> str:
        found: Any = {"policy_greedy": {"previous": 0.0, "model": bad / prompts}}
        calm: Any = CALM | {"wins": 10, "ties": 0, "losses": 0, "surprise": 0.0}
        improved = {"improved": {"wins": 1, "ties": 9, "losses": 0}}
        return guard.of_policy(calm | improved | {"bad": found, "prompts": prompts}, POLICY).health

    assert (answers(2, 16), answers(3, 16), answers(30, 200)) == ("healthy", "broken", "broken")


def test_ties_alone_teach_nothing() -> None:
    assert of_pairs(0, 1, 0).health == "spent"


CALM = {"prompts": 200, "bad": {"policy_sampled": {"previous": 0.0, "model": 0.01}}, "length_ratio": 1.1}


def judged(new: float, old: float, improved: float) -> guard.Verdict:
    """Scores around the given means, as 200 prompts would give them."""
    spread = [0.05 * (number % 5 - 2) for number in range(200)]
    values = {name: [mean + each for each in spread] for name, mean in (("new", new), ("old", old), ("up", improved))}
    scores: Any = {
        "model": {"policy_sampled": values["new"], "policy_greedy": values["new"], "improver_greedy": values["up"]},
        "previous": {"policy_sampled": values["old"], "policy_greedy": values["old"], "improver_greedy": values["up"]},
    }
    return guard.of_policy(CALM | compared(scores, seed=1), POLICY)


def test_with_a_judge_a_policy_must_not_fall_nor_its_improver_below_it() -> None:
    assert judged(0.9, 0.4, 0.95).health == "healthy"
    assert judged(0.99, 1.0, 0.99).health == "healthy"  # certain, but within the tolerance
    assert judged(0.8, 0.9, 0.95).health == "broken"
    assert judged(0.9, 0.4, 0.3).health == "spent"


def test_without_a_judge_a_policy_must_not_be_worse_to_the_last_improver_nor_implausible() -> None:
    improved = {"wins": 30, "ties": 119, "losses": 1}
    rose: dict[str, Any] = CALM | {"wins": 128, "ties": 21, "losses": 1, "surprise": -0.04, "improved": improved}
    assert guard.of_policy(rose, POLICY).health == "healthy"
    assert guard.of_policy(rose | {"wins": 20, "losses": 109}, POLICY).health == "broken"
    assert guard.of_policy(rose | {"surprise": 3.0}, POLICY).health == "broken"
    assert guard.of_policy(rose | {"length_ratio": 0.1}, POLICY).health == "broken"
    assert guard.of_policy(rose | {"improved": {"wins": 5, "ties": 100, "losses": 45}}, POLICY).health == "spent"
    for name, health in (("policy_greedy", "broken"), ("improver_greedy", "spent")):
        bad = {name: {"previous": 0.02, "model": 0.4}}
        assert guard.of_policy(rose | {"bad": bad}, POLICY).health == health


RECIPE = """\
run_dir: runs/guarded
steps:
  check: {stage: check-pairs, dataset: pairs.jsonl, policy: model, previous: last, judge: "taste:JUDGE"}
  after: {stage: gen-pairs, policy: model, dataset: prompts.jsonl, engine: echo}
"""
TASTE = "def good(prompt, response): return len(response)\ndef bad(prompt, response): return -len(response)\n"


@pytest.fixture
def guarded(world: Path) -> Path:
    """Pairs whose chosen text is longer, and a recipe that checks them before it goes on."""
    rows = [{"prompt": f"{n}?", "chosen": f"This is number {n}.", "rejected": f"It is {n}."} for n in range(50)]
    write_lines(world / "pairs.jsonl", rows)
    (world / "taste.py").write_text(TASTE)
    (world / "model").rename(world / "last")
    (world / "model").symlink_to("last")
    return world


def recipe_with(directory: Path, judge: str) -> str:
    (directory / "guarded.yaml").write_text(RECIPE.replace("JUDGE", judge))
    return "guarded.yaml"


def test_a_run_goes_on_after_a_healthy_verdict(guarded: Path, sgpo: Sgpo) -> None:
    result = sgpo("run", recipe_with(guarded, "good"))
    assert result.returncode == 0, result.stderr
    assert (guarded / "runs/guarded/after/manifest.json").exists()
    record = json.loads((guarded / "runs/guarded/run.json").read_text())
    assert record["best"] == "last"
    assert "stopped" not in record


def test_a_run_stops_at_a_bad_verdict_every_time_and_says_what_stands(guarded: Path, sgpo: Sgpo) -> None:
    recipe = recipe_with(guarded, "bad")
    for _ in range(2):
        result = sgpo("run", recipe)
        assert result.returncode == 9, result.stderr
        assert "the guard says broken; the result is last" in result.stderr
        assert result.stderr.count("better in 0 and worse in 50 of 50 pairs") == 1
        assert "hint: look at some pairs: chosen and rejected may be exchanged" in result.stderr
    assert not (guarded / "runs/guarded/after").exists()
    assert (guarded / "runs/guarded/report.html").exists()
    record = json.loads((guarded / "runs/guarded/run.json").read_text())
    assert (record["best"], record["stopped"]["step"], record["stopped"]["verdict"]) == ("last", "check", "broken")
    shown = sgpo("status", recipe).stdout
    assert "best: last" in shown
    assert "stopped by check: broken" in shown
    assert sgpo("check-pairs", "--recipe", recipe).returncode == 9


def test_a_run_that_was_stopped_goes_on_when_its_pairs_are_better(guarded: Path, sgpo: Sgpo) -> None:
    recipe = recipe_with(guarded, "bad")
    assert sgpo("run", recipe).returncode == 9
    rows = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in read_lines(guarded / "pairs.jsonl")
    ]
    write_lines(guarded / "pairs.jsonl", rows)
    result = sgpo("run", recipe)
    assert result.returncode == 0, result.stderr
    assert "stopped" not in json.loads((guarded / "runs/guarded/run.json").read_text())


@pytest.mark.parametrize(
    ("judge", "code", "said"),
    [
        ("silent", 2, "the judge scored 0 of 50 pairs"),
        ("huge", 2, "a judge gives a finite number"),
        ("raises", 2, "KeyError: 'boom' (taste.py:3)\nhint: --debug shows all of it"),
        ("half", 2, "the judge scored 20 of 50 pairs"),
        ("bad", 9, "chosen and rejected may be exchanged"),
    ],
)
def test_a_judge_that_cannot_judge(guarded: Path, sgpo: Sgpo, judge: str, code: int, said: str) -> None:
    more = "def raises(prompt, response): return {}['boom']\ndef silent(prompt, response): return None\n"
    more += "def half(prompt, response): return len(response) if int(prompt[:-1]) < 20 else None\n"
    (guarded / "taste.py").write_text(TASTE + more + "def huge(prompt, response): return 10**400\n")
    result = sgpo("run", recipe_with(guarded, judge))
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_with_a_judge_that_scored_next_to_nothing_there_is_no_verdict_on_a_policy() -> None:
    known: Any = {name: [0.5] * 20 for name in ("policy_sampled", "policy_greedy", "improver_greedy")}
    with pytest.raises(UsageError, match="scored 0 of 20 pairs of answers"):
        compared({"model": {name: [None] * 20 for name in known}, "previous": known}, seed=1)
    some: Any = {name: [0.5] * 18 + [None] * 2 for name in known}
    found = compared({"model": some, "previous": known}, seed=1)
    assert found["invalid"] == 6
    assert set(found["differences"]["policy_greedy"]) == {0.0}


def test_a_policy_is_not_judged_by_a_handful_of_prompts(guarded: Path, sgpo: Sgpo) -> None:
    flags = "--dataset pairs.jsonl --model model --previous last --max-rows 5 --output-dir out".split()
    result = sgpo("check-policy", *flags)
    assert result.returncode == 2
    assert "5 prompts say too little of a model" in result.stderr
    assert "give at least 16" in result.stderr
    assert not (guarded / "out/manifest.json").exists()


def test_of_a_part_of_the_pairs_the_counts_are_taken_in_proportion(guarded: Path, sgpo: Sgpo) -> None:
    made = "gen-pairs --policy model --dataset prompts.jsonl --engine echo --output-dir made".split()
    assert sgpo(*made).returncode == 0
    options = "check-pairs --dataset made --policy model --judge taste:good --max-rows 20 --min-pairs 5".split()
    sgpo(*options, "--output-dir", "part")
    measures = json.loads((guarded / "part/verdict.json").read_text())["measures"]
    whole = json.loads((guarded / "made/manifest.json").read_text())
    assert measures["pairs"] == 20
    assert measures["prompts"] == round(20 / whole["rows_out"] * whole["rows_in"])


def test_texts_that_are_the_same_are_no_pairs(guarded: Path, sgpo: Sgpo) -> None:
    rows = read_lines(guarded / "pairs.jsonl")
    write_lines(guarded / "pairs.jsonl", [row | {"chosen": row["rejected"] + " "} for row in rows[:45]] + rows[45:])
    result = sgpo("run", recipe_with(guarded, "good"))
    assert result.returncode == 9
    assert "5 pairs, at least 30 are needed" in result.stderr
    assert "hint: give more prompts, or --min-pairs" in result.stderr
    assert "better in 5" not in result.stderr  # of what is left, all is well
    measures = json.loads((guarded / "runs/guarded/check/verdict.json").read_text())["measures"]
    assert (measures["pairs"], measures["identical"]) == (5, 45)


def test_a_judge_that_talks_is_refused(guarded: Path, sgpo: Sgpo) -> None:
    flags = ["--dataset", "pairs.jsonl", "--policy", "model", "--output-dir", "out"]
    result = sgpo("check-pairs", *flags, "--judge", "openai:some")
    assert result.returncode == 2
    assert "judges: demo, reward:" in result.stderr


@pytest.mark.model
def test_the_improvers_preference_turns_with_the_pair(base: Path) -> None:
    from sgpo_cli.preference import margins, preferred
    from sgpo_cli.scoring import Scorer

    scorer, asked = Scorer(str(base)), [chat(number) for number in range(6)]
    texts = [sentence(number + 9) for number in range(6)], [sentence(number + 20) for number in range(6)]
    there, back = margins(scorer, "Better!", asked, *texts), margins(scorer, "Better!", asked, *reversed(texts))
    for one, other in zip(there, back, strict=True):
        assert one == pytest.approx((-other[1], -other[0]), abs=1e-5)
        assert preferred(*one) == -preferred(*other)


@pytest.mark.model
def test_both_checks_run_without_a_judge(base: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": chat(n), "chosen": sentence(n + 1), "rejected": sentence(n + 2)} for n in range(40)]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    found = run_stage("check-pairs", tmp_path / "pairs", dataset=str(tmp_path / "pairs.jsonl"), policy=str(base))
    measures = found["measures"]
    assert measures["by"] == "improver"
    assert measures["wins"] + measures["ties"] + measures["losses"] == 40
    assert found["best"] == str(base)
    options = {"dataset": str(tmp_path / "pairs.jsonl"), "model": str(base), "previous": str(base)}
    found = run_stage("check-policy", tmp_path / "policy", **options, max_new_tokens=8, max_rows=16)
    assert found["measures"]["ties"] == 16  # the same model gives the same answers
    assert json.loads((tmp_path / "policy/verdict.json").read_text())["verdict"] == found["verdict"]
