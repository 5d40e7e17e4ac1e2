"""Measures of single texts, of two texts, and of many numbers; pure, and nothing about rows or steps."""

import heapq
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeGuard

from sgpo_cli.comparison import distance

SHINGLE = 5  # words in a row that two texts must share
SKETCH = 6  # of a text's shingle hashes, the smallest; texts with 95 % alike share all six in 73 of 100 cases
REPETITIVE = 0.2  # of its words, GRAM in a row, that a text has had before: more, and it repeats itself
GRAM = 4  # words in a row that come again in a text that repeats itself
LETTERS = 10  # that a text must have before its script counts
MOST_WORDS = 1_000  # of a text, for what takes time
OPENING = 3  # words
FEWEST = 10  # texts that an opening must have


@lru_cache(maxsize=1 << 16)
def _number(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))  # not hash(): that of a text changes with every process


def sketch(text: str) -> int:
    """Equal for texts with the same SKETCH smallest shingle hashes: near copies, whatever the rest."""
    numbers = [_number(word) for word in text.split()[:MOST_WORDS]]
    if len(numbers) <= SHINGLE:
        return hash(tuple(numbers))
    shingles = zip(*(numbers[start:] for start in range(SHINGLE)), strict=False)
    return hash(tuple(heapq.nsmallest(SKETCH, map(hash, shingles))))


def edit_share(old: str, new: str) -> float:
    """The word-level edit distance over the words of the longer text: 0 is unchanged, 1 all other words."""
    before, after = old.split()[:MOST_WORDS], new.split()[:MOST_WORDS]
    return round(distance(before, after) / max(len(before), len(after), 1), 4)


def length_ratio(old: str, new: str) -> float:
    """Characters of `new` for each of `old`."""
    return round(max(len(new), 1) / max(len(old), 1), 4)


def repetition(words: Sequence[str]) -> float:
    """The share of GRAM words in a row that the text has had before."""
    words = words[:MOST_WORDS]
    grams = list(zip(*(words[start:] for start in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def openings(old: Sequence[str], new: Sequence[str]) -> list[dict[str, Any]]:
    """The first words that are far more usual in `new` than in `old`, with both shares, most usual first."""
    before, after = (Counter(opening for text in texts if (opening := _opening(text))) for texts in (old, new))
    found = [
        {"words": words, "new": round(count / len(new), 4), "old": round(before[words] / len(old), 4)}
        for words, count in sorted(after.items(), key=lambda item: (-item[1], item[0]))
        if count >= FEWEST and count / len(new) >= 0.05 and count / len(new) > 4 * (before[words] / len(old) + 0.005)
    ]
    return found[:5]


def _opening(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:['\u2019]\w+)?", text[:200].casefold())[:OPENING])


@lru_cache(maxsize=1 << 14)
def _script_of(letter: str) -> str:
    """The script by the letter's Unicode name; the scripts that Japanese and Chinese mix count as one."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0].removesuffix("-")
    return "CJK" if name in ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO") else name


def script(text: str) -> str:
    """The script of most letters, such as LATIN or CJK; "" for too few letters."""
    counts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            counts[_script_of(letter)] += count
    return min(counts, key=lambda name: (-counts[name], name)) if counts.total() >= LETTERS else ""


def finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that arithmetic can take: no truth value, no NaN, no integer beyond floats."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Mean, 5 %, median, 95 % and the largest."""
    ordered = sorted(values)
    if not ordered:
        return {}
    points = {"p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    mean = {"mean": round(sum(ordered) / len(ordered), 4)}
    return mean | {name: round(quantile(ordered, share), 4) for name, share in points.items()}


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def histogram(values: Iterable[float], low: float, high: float, bins: int) -> dict[str, Any]:
    """Counts in `bins` equal bins; values beyond the range are in the first and last one."""
    counts = [0] * bins
    for value in values:
        counts[min(max(int((value - low) / (high - low) * bins), 0), bins - 1)] += 1
    return {"low": round(low, 4), "high": round(high, 4), "counts": counts}
