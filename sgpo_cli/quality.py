"""What a data step's rows are like: lengths, changes, duplicates, openings; and sentences for what looks wrong.

What is costly is measured on a seeded sample of SAMPLE rows; near copies are looked for among all of them (the
first MOST_KEYS). Memory holds the sample, and about a hundred bytes for each row and text to know its copies by.
"""

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.comparison import plain, sides
from sgpo_cli.errors import IntegrityError
from sgpo_cli.measures import (
    REPETITIVE,
    edit_share,
    finite,
    histogram,
    length_ratio,
    openings,
    quantile,
    quantiles,
    repetition,
    script,
    sketch,
)
from sgpo_cli.schema import CANDIDATE

logger = logging.getLogger(__name__)

SAMPLE = 5_000
SEED = 1
MOST_KEYS = 100_000
LONG_ENOUGH = 20  # words; shorter texts say nothing about repetition or a missing end
END = re.compile(r"[^\w,;:\-]\s*$")
TEXTS = ("prompt", "rejected", "chosen", "response", "target", "reference", "completion")

Row = Mapping[str, Any]


def facts(directory: Path) -> dict[str, Any]:
    """For a data step's manifest: `quality`, as `describe` gives it; what looks wrong is logged."""
    found = describe(directory)
    for text in found["warnings"] if found else ():
        logger.warning("%s: %s", directory, text)
    return {"quality": found} if found else {}


def describe(directory: Path) -> dict[str, Any] | None:
    """The measures of the rows in `directory`, in numbers that JSON takes; None when there are no rows.

    Raises:
        IntegrityError: a line is not a JSON object.
    """
    kept, dropped = (directory / name for name in DATA_FILES)
    rows = count_rows(kept)
    if not rows:
        return None
    sample, keys = _read(kept, rows)
    old_new = sides(sample[0])
    found: dict[str, Any] = {
        "rows": rows,
        "sampled": len(sample),
        "texts": {name: _text_facts(name, sample) for name in TEXTS if name in sample[0]},
        "near_duplicates": {name: round(count / min(rows, MOST_KEYS), 4) for name, count in keys.items()},
        "cut": _share_cut(rows, dropped),
    }
    if old_new:
        found["pair"] = _pair_facts(*old_new, sample)
        found["openings"] = openings(*([plain(row.get(name)) for row in sample] for name in old_new))
        found["script_switch"] = _share(_switched(row.get("prompt"), row.get(old_new[1])) for row in sample)
    if "log_ppl" in sample[0]:
        found["log_ppl"] = _log_ppl(sample, dropped)
    return found | {"warnings": warnings(found)}


def has_sides(directory: Path) -> bool:
    """Whether the rows in `directory` have two texts to compare; looks at the first."""
    path = directory / DATA_FILES[0]
    return path.exists() and any(sides(row) for row in islice(lines(path), 1))


def lines(path: Path, picked: Container[int] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a step's file, one at a time, or those with the picked numbers.

    Raises:
        IntegrityError: a line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if picked is None or number in picked:
                yield _parsed(line, f"{path}:{number + 1}")


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{place}: not valid JSON ({error})", "make the step anew") from None
    if not isinstance(row, dict):
        raise IntegrityError(f"{place}: expected a JSON object", "make the step anew")
    return row


def sampled(path: Path, size: int, seed: int = SEED) -> list[dict[str, Any]]:
    """A seeded sample of the rows, in file order."""
    rows = count_rows(path)
    return list(lines(path, _picked(rows, size, seed))) if rows else []


def _picked(rows: int, size: int, seed: int = SEED) -> set[int]:
    return set(random.Random(seed).sample(range(rows), min(size, rows)))


def count_rows(path: Path) -> int:
    """The lines of a file; 0 when there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _read(path: Path, rows: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A sample, and how many prompts and new texts are near copies of an earlier one."""
    picked = _picked(rows, SAMPLE)
    sample: list[dict[str, Any]] = []
    known: dict[str, set[int]] = {}
    copies: Counter[str] = Counter()
    for number, row in enumerate(lines(path)):
        if number in picked:
            sample.append(row)
        if number >= MOST_KEYS:
            continue
        further = CANDIDATE.search(str(row.get("id"))) is not None  # of a prompt that has been counted
        for name in (*(() if further else ("prompt",)), *(sides(row) or ())[1:]):
            key = sketch(plain(row.get(name)))
            copies[name] += key in known.setdefault(name, set())
            known[name].add(key)
    return sample, {name: copies[name] for name in known if name in sample[0]}


def _text_facts(name: str, sample: Sequence[Row]) -> dict[str, Any]:
    texts = [plain(row.get(name)) for row in sample]
    split = [text.split() for text in texts]
    long = [(text, words) for text, words in zip(texts, split, strict=True) if len(words) >= LONG_ENOUGH]
    return {
        "words": quantiles([len(words) for words in split]),
        "characters": quantiles([len(text) for text in texts]),
        "repetitive": round(sum(repetition(words) > REPETITIVE for _, words in long) / len(texts), 4),
        "unfinished": round(sum(not END.search(text) for text, _ in long) / len(texts), 4),
        "scripts": _scripts(texts),
    }


def _pair_facts(old: str, new: str, sample: Sequence[Row]) -> dict[str, Any]:
    pairs = [(plain(row.get(old)), plain(row.get(new))) for row in sample]
    edits = [edit_share(*pair) for pair in pairs]
    ratios = [length_ratio(*pair) for pair in pairs]
    words = [[len(text.split()) for text in texts] for texts in zip(*pairs, strict=True)]
    widest = min(max(2, math.ceil(max(abs(math.log2(ratio)) for ratio in ratios))), 4)
    longest = max(10, 1.1 * quantile(sorted(words[0] + words[1]), 0.99))
    return {
        "old": old,
        "new": new,
        "unchanged": _share(first.strip() == second.strip() for first, second in pairs),
        "longer": _share(len(second) > len(first) for first, second in pairs),
        "old_words": histogram(words[0], 0, longest, 30),
        "new_words": histogram(words[1], 0, longest, 30),
        "edit_share": quantiles(edits),
        "edit_histogram": histogram(edits, 0, 1, 20),
        "length_ratio": quantiles(ratios),
        "ratio_histogram": histogram([math.log2(ratio) for ratio in ratios], -widest, widest, 32),
    }


def _scripts(texts: Iterable[str]) -> dict[str, float]:
    counts = Counter(name for text in texts if (name := script(text)))
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common(5)}


def _switched(prompt: object, answer: object) -> bool:
    first, second = script(plain(prompt)), script(plain(answer))
    return bool(first and second and first != second)


def _share_cut(rows: int, dropped: Path) -> float:
    """The share of all rows that were dropped because a text reached the limit."""
    reasons = Counter(str(row.get("reason")) for row in lines(dropped)) if dropped.exists() else Counter()
    cut = sum(count for reason, count in reasons.items() if reason.startswith("cut"))
    return round(cut / (rows + reasons.total()), 4)


def _log_ppl(sample: Sequence[Row], dropped: Path) -> dict[str, Any]:
    kept = _numbers(sample)
    out = _numbers(sampled(dropped, SAMPLE)) if dropped.exists() else []
    values = sorted(kept + out)
    if not values:
        return {}
    # What is kept fills the left half: junk may lie so far out that all else would be one bar.
    high = max(min(2 * max(kept, default=0.0), 1.05 * values[-1]), 0.1)
    return {
        "quantiles": quantiles(values),
        "kept": histogram(kept, 0, high, 40),
        "dropped": histogram(out, 0, high, 40),
    }


def _numbers(rows: Iterable[Row]) -> list[float]:
    return [value for row in rows if finite(value := row.get("log_ppl"))]


def _share(flags: Iterable[bool]) -> float:
    found = list(flags)
    return round(sum(found) / len(found), 4) if found else 0.0


def warnings(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each measure that is beyond its threshold."""
    return [text for is_so, text in (*_pair_warnings(found), *_text_warnings(found)) if is_so]


def _pair_warnings(found: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    if not (pair := found.get("pair")):
        return
    old, new, ratio = pair["old"], pair["new"], pair["length_ratio"]["median"]
    yield (
        pair["unchanged"] > 0.05,
        f"{pair['unchanged']:.1%} of the {new} texts are the {old} text unchanged: they teach to copy",
    )
    yield (
        ratio > 2 or ratio < 0.5,
        f"{new} is typically {ratio:.1f} times as long as {old}: length may be learned in place of quality",
    )
    yield (
        pair["edit_share"]["median"] < 0.05,
        f"{new} and {old} typically differ in {pair['edit_share']['median']:.1%} of their words: a weak signal",
    )
    for opening in found["openings"]:
        yield (
            opening["new"] >= 0.1,
            f'{opening["new"]:.1%} of the {new} texts begin with "{opening["words"]}", {opening["old"]:.1%} of the '
            f"{old} ones do: an opening is learned first",
        )
    switch = found["script_switch"]
    yield switch > 0.02, f"{switch:.1%} of the {new} texts are in another script than their prompt"


def _text_warnings(found: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    yield found["cut"] > 0.05, f"{found['cut']:.1%} of the rows were cut at the longest length: raise max_new_tokens"
    for name, share in found["near_duplicates"].items():
        yield share > 0.2, f"{share:.1%} of the {name} texts are near copies of another one"
    for name, facts in found["texts"].items():
        if name == "prompt":
            continue
        yield facts["repetitive"] > 0.02, f"{facts['repetitive']:.1%} of the {name} texts repeat themselves"
