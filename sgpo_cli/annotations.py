"""Win rates from files of the public benchmarks: AlpacaEval's annotations, Arena-Hard's judgments."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgpo_cli import arena_hard, contests
from sgpo_cli.errors import UsageError
from sgpo_cli.interchange import read_alpaca_annotations, read_records

Entry = dict[str, Any]
Styles = dict[str, dict[str, arena_hard.Style]]
"""By model and uid."""


def win_rates(
    paths: Sequence[Path], seed: int, official: str | None, answers: Path | None
) -> tuple[list[Entry], list[str]]:
    """Entries for JSON, and the same as lines of text.

    Args:
        paths: files of one kind, each of one model; of Arena-Hard all against one baseline.
        official: AlpacaEval's df_gamed.csv or instruction_difficulty.csv.
        answers: Arena-Hard's `model_answer`, for style control.

    Raises:
        UsageError: a file is neither annotations nor judgments.
    """
    kinds = {"games" in read_records(path)[0] for path in paths}
    if len(kinds) > 1:
        raise UsageError("annotations of AlpacaEval and judgments of Arena-Hard in one call", "give them separately")
    if kinds == {True}:
        return _arena_hard(paths, seed, answers)
    entries = [
        entry for path in paths for entry in contests.results([_contest(path)], seed, _official(path, official))
    ]
    return entries, contests.table(entries)


def _official(path: Path, official: str | None) -> Any:
    return contests.read_official(official, len(read_alpaca_annotations(path))) if official else None


def _contest(path: Path) -> contests.Contest:
    rows = sorted(read_alpaca_annotations(path), key=lambda row: int(row.get("index") or 0))
    own, other = ([str(row[name]) for row in rows] for name in ("output_2", "output_1"))
    values = [math.nan if row["preference"] is None else row["preference"] for row in rows]
    names = (
        str(rows[0].get("generator_2", path.stem)),
        "policy",
        "given",
        str(rows[0].get("generator_1", "baseline")),
    )
    return contests.Contest(*names, own, other, np.array(values, float))


def _arena_hard(paths: Sequence[Path], seed: int, answers: Path | None) -> tuple[list[Entry], list[str]]:
    judged = {path: read_records(path) for path in paths}
    baselines = {str(row.get("baseline")) for rows in judged.values() for row in rows}
    if len(baselines) > 1:
        raise UsageError(f"judgments against {len(baselines)} baselines", "give those against one of them at a time")
    baseline = baselines.pop()
    names = [str(rows[0].get("model", path.stem)) for path, rows in judged.items()]
    styles = _styles(answers, [*names, baseline]) if answers else None
    battles, invalid = _battles(dict(zip(names, judged.values(), strict=True)), baseline, styles)
    plain = arena_hard.scores(battles, len(names), seed, ())
    controlled = arena_hard.scores(battles, len(names), seed) if styles else [(None, None)] * len(names)
    entries: list[Entry] = []
    for name, rows, score, style in zip(names, judged.values(), plain, controlled, strict=True):
        entry: Entry = {"name": name, "baseline": baseline, "n": len(rows), "invalid": invalid[name]}
        entry |= dict(zip(("score", "ci95"), score, strict=True))
        entries.append(entry | dict(zip(("style_controlled", "style_ci95"), style, strict=True)))
    return entries, _arena_table(entries)


def _battles(
    judged: dict[str, list[Entry]], baseline: str, styles: Styles | None
) -> tuple[arena_hard.Battles, dict[str, int]]:
    """All games with a verdict, and how many prompts have none, by model."""
    prompts: dict[str, int] = {}
    lines: list[list[float]] = []
    invalid: dict[str, int] = {}
    for number, (name, rows) in enumerate(judged.items()):
        outcomes = {str(row["uid"]): found for row in rows if (found := _outcomes(row))}
        invalid[name] = len(rows) - len(outcomes)
        if not outcomes:
            raise UsageError(f"{name}: no judgment with two verdicts", "are these Arena-Hard's judgments?")
        for uid, games in outcomes.items():
            prompt = prompts.setdefault(uid, len(prompts))
            style = arena_hard.style_difference(styles[name][uid], styles[baseline][uid]) if styles else [0.0] * 4
            lines += [[number, prompt, outcome, copies, *style] for outcome, copies in games]
    table = np.array(lines)
    model, prompt_of = table[:, 0].astype(int), table[:, 1].astype(int)
    return arena_hard.Battles(model, prompt_of, table[:, 2], table[:, 3], table[:, 4:]), invalid


def _outcomes(row: Entry) -> list[tuple[float, int]] | None:
    """The two games of a judgment as (1 where the model won, copies); None where one has no verdict."""
    found = []
    for game, model_is_a in zip(row.get("games") or (), (False, True), strict=False):
        outcome = arena_hard.outcome_of(str((game or {}).get("score")))
        if outcome is None:
            return None
        found.append((outcome[0] if model_is_a else 1 - outcome[0], outcome[1]))
    return found if len(found) == 2 else None


def _styles(answers: Path, names: Sequence[str]) -> Styles:
    """Per model and uid the `metadata` of its answer, counted from the text where there is none."""
    found = {}
    for name in names:
        rows = read_records(answers / f"{name.rpartition('/')[2]}.jsonl")
        found[name] = {str(row["uid"]): row.get("metadata") or arena_hard.style_of(_text(row)) for row in rows}
    return found


def _text(row: Entry) -> str:
    content = row["messages"][-1]["content"]
    return str(content["answer"] if isinstance(content, dict) else content)


def _arena_table(entries: Sequence[Entry]) -> list[str]:
    lines = [f"{'model':<32}{'score %':>8}  {'95 %':<14}{'style %':>8}  {'95 %':<14}{'prompts':>8}{'invalid':>8}"]
    for entry in entries:
        lines.append(
            f"{entry['name']:<32}{contests.percent(entry['score']):>8}  {contests.percents(entry['ci95']):<14}"
            f"{contests.percent(entry['style_controlled']):>8}  {contests.percents(entry['style_ci95']):<14}"
            f"{entry['n']:>8}{entry['invalid']:>8}"
        )
    return lines
