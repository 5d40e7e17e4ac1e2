"""From scores or verdicts to a table: each model's answers against the baseline's."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgpo_cli import arena_hard, winrates
from sgpo_cli.errors import UsageError
from sgpo_cli.winrates import Array

CODES = {"A": 1.0, "B": 0.0, "tie": 0.5, "invalid": math.nan}
ORDERS = ("model_first", "model_second")
MANY_INVALID, FIRST_WINS, DECIDED, SAME_ANSWER, FAR = 0.05, (0.4, 0.6), 30, 0.5, 0.1  # beyond these, a note

Verdicts = Mapping[str, Sequence[str | None]]
"""By order, a verdict per prompt; None where it was not asked for."""


@dataclass(frozen=True)
class Contest:
    """One answer of a model against the baseline, on all prompts.

    Args:
        preferences: [prompts], 1 the model won, 0.5 a tie, NaN no valid verdict.
        verdicts: of a pairwise judge; None where scores were compared.
    """

    name: str
    role: str
    decoding: str
    baseline: str
    texts: Sequence[str]
    baseline_texts: Sequence[str]
    preferences: Array
    verdicts: Verdicts | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.role} {self.decoding}"


def preferences_of_scores(scores: Sequence[float | None], baseline: Sequence[float | None]) -> Array:
    """The higher score wins, equal scores tie, a missing one is no verdict."""
    own, other = (np.array([math.nan if each is None else each for each in column]) for column in (scores, baseline))
    return np.where(np.isnan(own) | np.isnan(other), np.nan, (np.sign(own - other) + 1) / 2)


def preferences_of_verdicts(verdicts: Verdicts) -> Array:
    """A preference per prompt: agreeing orders decide; identical answers were not asked about and tie."""
    games, asked = _games(verdicts)
    model_first = np.tile([[True, False]], (len(games), 1))
    both = asked.all(axis=1)
    found = np.full(len(games), 0.5)
    found[both] = winrates.preferences_of(games[both], model_first[both])
    for order in range(2):
        alone = asked[:, order] & ~both
        found[alone] = winrates.preferences_of(games[alone, order : order + 1], model_first[alone, order : order + 1])
    return found


def _games(verdicts: Verdicts) -> tuple[Array, Any]:
    """Whether the answer shown first won, and whether the game was asked for, [prompts, orders]."""
    table = [[CODES.get(word or "", math.nan) for word in verdicts[order]] for order in ORDERS]
    asked = [[word is not None for word in verdicts[order]] for order in ORDERS]
    return np.array(table).T, np.array(asked).T


def _position_facts(verdicts: Verdicts) -> dict[str, float]:
    games, asked = _games(verdicts)
    both, model_first = asked.all(axis=1), np.array([[True, False]])
    played = np.where(asked, games, np.nan)
    place = winrates.position_bias(played, np.tile(model_first, (len(played), 1)))
    agreement = winrates.position_bias(games[both], np.tile(model_first, (int(both.sum()), 1)))
    decided = int(((played == 0) | (played == 1)).sum())
    return {**place, "consistency": agreement["consistency"], "decided_games": decided}


def results(contests: Sequence[Contest], seed: int, official: winrates.Official | None = None) -> list[dict[str, Any]]:
    """One entry per contest: rates in 0..1 with 95 % intervals, counts, position bias, and what is odd about it."""
    controlled = _style_controlled(contests, seed)
    entries = []
    for contest, style in zip(contests, controlled, strict=True):
        lengths, baseline_lengths = (
            np.array([len(text) for text in texts], float) for texts in (contest.texts, contest.baseline_texts)
        )
        entry: dict[str, Any] = {"name": contest.name, "role": contest.role, "decoding": contest.decoding}
        entry["baseline"] = contest.baseline
        entry |= winrates.summary(contest.preferences, lengths, baseline_lengths, seed, official)
        entry |= style
        if contest.verdicts is not None:
            entry |= _position_facts(contest.verdicts)
        entry = {key: _rounded(value) for key, value in entry.items()}
        entries.append({**entry, "notes": _notes(entry, contest)})
    return entries


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.3g}") if 0 < abs(value) < 1e-3 else round(value, 4) if math.isfinite(value) else None


def _style_controlled(contests: Sequence[Contest], seed: int) -> list[dict[str, Any]]:
    """Arena-Hard's style-controlled score of each contest, all fitted together."""
    rows: list[list[float]] = []
    for number, contest in enumerate(contests):
        games, asked = _games(contest.verdicts) if contest.verdicts else (contest.preferences[:, None], None)
        for prompt, (own, other) in enumerate(zip(contest.texts, contest.baseline_texts, strict=True)):
            outcomes = [
                first if order == 0 else 1 - first
                for order, first in enumerate(games[prompt])
                if (asked is None or asked[prompt, order]) and not math.isnan(first)
            ]
            if outcomes:
                style = arena_hard.style_difference(arena_hard.style_of(own), arena_hard.style_of(other))
                rows += [[number, prompt, outcome, 1.0, *style] for outcome in outcomes]
    if not rows:
        return [{"style_controlled": None, "style_ci95": None} for _ in contests]
    table = np.array(rows)
    battles = arena_hard.Battles(
        table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2], table[:, 3], table[:, 4:]
    )
    fought = set(battles.model.tolist())
    found = arena_hard.scores(battles, len(contests), seed)
    return [
        {"style_controlled": score, "style_ci95": ends}
        if number in fought
        else {"style_controlled": None, "style_ci95": None}
        for number, (score, ends) in enumerate(found)
    ]


def _notes(entry: Mapping[str, Any], contest: Contest) -> list[str]:
    notes = []
    if entry["invalid"] > MANY_INVALID * entry["n"]:
        notes.append(f"{entry['invalid']} of {entry['n']} prompts have no valid verdict")
    first = entry.get("first_position_wins")
    if first is not None and entry["decided_games"] >= DECIDED and not FIRST_WINS[0] <= first <= FIRST_WINS[1]:
        notes.append(f"the answer shown first won {first:.0%} of the decided games")
    if entry["win_rate"] is not None and entry["lc_win_rate"] is None:
        notes.append("all answers differ in length by the same amount, so its effect cannot be told")
    if entry["lc_win_rate"] is not None and abs(entry["lc_win_rate"] - entry["win_rate"]) > FAR:
        notes.append("length-controlled and raw rate are far apart: length and verdict hardly part on these prompts")
    most = max(map(list(contest.texts).count, set(contest.texts)))
    if most > SAME_ANSWER * entry["n"] and entry["n"] > 1:
        notes.append(f"the same answer to {most} of {entry['n']} prompts; a judge can be fooled by one text")
    return notes


def table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The entries as lines of text, rates in percent."""
    head = f"{'model':<16}{'role':<9}{'decoding':<9}{'wins %':>7}  {'95 %':<14}{'LC %':>6}  {'95 %':<14}"
    lines = [f"{head}{'style %':>8}{'ties %':>7}{'invalid':>8}{'p (sign)':>9}{'length':>7}"]
    notes = []
    for entry in entries:
        valid = entry["n"] - entry["invalid"]
        lines.append(
            f"{entry['name']:<16}{entry['role']:<9}{entry['decoding']:<9}"
            f"{percent(entry['win_rate']):>7}  {percents(entry['ci95']):<14}"
            f"{percent(entry['lc_win_rate']):>6}  {percents(entry['lc_ci95']):<14}"
            f"{percent(entry['style_controlled']):>8}{percent(entry['ties'] / valid if valid else None):>7}"
            f"{percent(entry['invalid'] / entry['n']):>8}{entry['sign_test_p']:>9.2g}{entry['length']:>7.0f}"
        )
        notes += [f"note: {entry['name']} {entry['role']} {entry['decoding']}: {note}" for note in entry["notes"]]
    return lines + notes


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"


def percents(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def read_official(path: str, prompts: int) -> winrates.Official:
    """AlpacaEval's `instruction_difficulty.csv`, or `df_gamed.csv` with difficulties and gamed baselines.

    Args:
        prompts: how many there are; they must be the benchmark's, in its order.

    Raises:
        UsageError: it is neither, or of another number of prompts.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        if rows and "std_delta_len" in rows[0]:
            difficulty = {int(row["index"]): float(row["instruction_difficulty"]) for row in rows}
            names = ("preference", "std_delta_len", "instruction_difficulty")
            gamed = np.array([[float(row[name]) for name in names] for row in rows if row["preference"]])
        else:
            difficulty = {number: float(list(row.values())[-1]) for number, row in enumerate(rows)}
            gamed = None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not AlpacaEval's df_gamed.csv or instruction_difficulty.csv ({error})") from None
    if sorted(difficulty) != list(range(prompts)):
        raise UsageError(
            f"{path}: difficulties of {len(difficulty)} prompts, and there are {prompts} here",
            "the official files are for the benchmark's own prompts, all of them and in its order",
        )
    return winrates.Official(np.array([difficulty[number] for number in range(prompts)]), gamed)
