"""The rows that the report's browser pages through: two texts, what differs between them, their numbers.

A step with more rows than fit is sampled with a seed, so that the page stays small.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.comparison import differences, plain, sides
from sgpo_cli.measures import edit_share, finite, length_ratio
from sgpo_cli.quality import lines, sampled
from sgpo_cli.report.collect import Run, StepFacts

MOST_ROWS = 4_000  # of a step
MOST_BYTES = 14_000_000  # of all rows together
MOST_LETTERS = 8_000  # of one text
SEED = 1

Row = dict[str, Any]


@dataclass(frozen=True)
class ExampleSet:
    """Rows of one step; `total` says how many it has altogether."""

    title: str
    old: str
    new: str
    total: int
    rows: list[Row]


def example_sets(run: Run) -> list[ExampleSet]:
    """Pairs first, then answers of the first and the last model, then targets; each with what was dropped."""
    order = {"dpo": 0, "gen-pairs": 0, "evaluate": 1}
    steps = sorted((step for step in run.steps if step.manifest), key=lambda step: order.get(step.stage, 2))
    candidates = [found for step in steps if (found := _evaluated(step) if step.metrics else _compared(step))]
    share = MOST_BYTES // max(len(candidates), 1)
    return [_fitting(found, share) for found in candidates if found.rows]


def embed(sets: list[ExampleSet]) -> str:
    """The sets as JSON that can stand in a script element."""
    text = json.dumps([vars(found) for found in sets], ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _fitting(found: ExampleSet, limit: int) -> ExampleSet:
    """A seeded choice of the rows that stays below `limit` bytes, in the order they had."""
    sizes = [len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")) for row in found.rows]
    order = random.Random(SEED).sample(range(len(sizes)), len(sizes))
    picked: set[int] = set()
    for number in order:
        limit -= sizes[number]
        if limit < 0:
            break
        picked.add(number)
    rows = [row for number, row in enumerate(found.rows) if number in picked]
    return ExampleSet(found.title, found.old, found.new, found.total, rows)


def _compared(step: StepFacts) -> ExampleSet | None:
    """Pairs or targets, kept and dropped."""
    kept, dropped = (step.directory / name for name in DATA_FILES)
    if step.quality is None or step.quality.pair is None:
        return None
    assert step.manifest is not None
    rows = sampled(kept, MOST_ROWS, SEED)
    out = sampled(dropped, MOST_ROWS // 4, SEED) if dropped.exists() else []
    old, new = step.quality.pair.old, step.quality.pair.new
    examples = [_example(row, row[old], row[new]) for row in rows + out if sides(row) == (old, new)]
    return ExampleSet(step.name, old, new, step.manifest.rows_in or len(rows), examples)


def _example(row: Row, old: object, new: object, **more: Any) -> Row:
    before, after = (_cut(plain(text)) for text in (old, new))
    facts = {name: round(value, 4) for name, value in row.items() if name != "id" and finite(value)}
    example = {
        "id": _cut(str(row.get("id", ""))),
        "prompt": _cut(plain(row.get("prompt"))),
        "parts": differences(before, after),
        "edit": edit_share(before, after),
        "ratio": length_ratio(before, after),
        "facts": list(facts.items()),
        **more,
    }
    return example | ({"reason": _cut(str(row["reason"]))} if "reason" in row else {})


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + f" … ({len(text) - MOST_LETTERS} more)"


def _evaluated(step: StepFacts) -> ExampleSet | None:
    """Answers of the last model beside those of the first, with their scores."""
    assert step.metrics is not None
    names = list(dict.fromkeys(entry.name for entry in step.metrics.models))
    if len(names) < 2:
        return None
    first, last = names[0], names[-1]
    before: dict[str, Row] = {}
    examples = []
    for row in _answers(step, {first, last}):
        if row["model"] == first and len(before) < MOST_ROWS:
            before[str(row["id"])] = row
        elif row["model"] == last and (other := before.pop(str(row["id"]), None)):
            scores = [round(float(each["score_policy_sampled"]), 4) for each in (other, row)]
            shown = {"id": row["id"], "prompt": row.get("prompt")}
            examples.append(_example(shown, other["policy_sampled"], row["policy_sampled"], scores=scores))
    title = f"{step.name}: policy, sampled"
    return ExampleSet(title, first, last, len(examples), examples) if examples else None


def _answers(step: StepFacts, models: set[str]) -> Iterator[Row]:
    path = step.directory / DATA_FILES[0]
    for row in lines(path) if path.exists() else ():
        scored = finite(row.get("score_policy_sampled")) and "policy_sampled" in row
        if scored and str(row.get("model")) in models and "id" in row:
            yield row
