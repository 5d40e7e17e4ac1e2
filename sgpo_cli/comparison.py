"""Two texts of a row, and what differs between them, word by word."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

Segment = tuple[int, str]
"""A stretch of text: 0 in both texts, -1 only in the old one, 1 only in the new one."""

SIDES = (("rejected", "chosen"), ("response", "target"))
WORD = re.compile(r"\s+|\S+\s*")  # with the white space behind it, so that the words make up the text
MOST_MATCHES = 40_000  # pairs of equal words; beyond (runaway repetition), the search takes seconds


def plain(value: object) -> str:
    """A text, or the text of a list of messages; other turns than one assistant's are named."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return "" if value is None else str(value)
    messages = [message for message in value if isinstance(message, dict)]
    if all("text" in each for each in messages):  # candidates with their scores
        return "\n".join(f"{each.get('score')}: {each['text']}" for each in messages)
    contents = [str(message.get("content", "")) for message in messages]
    if len(messages) == 1:
        return contents[0]
    return "\n\n".join(f"{message.get('role')}: {text}" for message, text in zip(messages, contents, strict=True))


def sides(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns to compare, (old, new), such as (rejected, chosen)."""
    return next((pair for pair in SIDES if all(isinstance(row.get(name), str | list) for name in pair)), None)


def differences(old: str, new: str) -> list[Segment]:
    """The stretches that lead from `old` to `new`.

    Those with 0 or -1 make up `old`, those with 0 or 1 make up `new`. Words are equal whatever white space
    follows them; where that differs, it is a stretch of its own.
    """
    before, after = WORD.findall(old), WORD.findall(new)
    start = _alike(before, after)
    end = _alike(before[start:][::-1], after[start:][::-1])
    middle = _changes(before[start : len(before) - end], after[start : len(after) - end])
    tail = _same(before[len(before) - end :], after[len(after) - end :])
    return _joined([*_same(before[:start], after[:start]), *middle, *tail])


def _alike(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words the two begin with alike."""
    pairs = zip(first, second, strict=False)
    return next(
        (number for number, (a, b) in enumerate(pairs) if a.strip() != b.strip()), min(len(first), len(second))
    )


def _changes(before: list[str], after: list[str]) -> list[Segment]:
    first, second = [word.strip() for word in before], [word.strip() for word in after]
    counts = Counter(first)
    if sum(counts[word] for word in second) > MOST_MATCHES:
        return [(-1, "".join(before)), (1, "".join(after))]
    segments: list[Segment] = []
    for kind, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if kind == "equal":
            segments += _same(before[a:b], after[c:d])
        else:
            segments += [(-1, "".join(before[a:b])), (1, "".join(after[c:d]))]
    return segments


def _same(before: Sequence[str], after: Sequence[str]) -> list[Segment]:
    segments: list[Segment] = []
    for old, new in zip(before, after, strict=True):
        if old == new:
            segments.append((0, old))
        else:
            word = old.strip()
            segments += [(0, word), (-1, old[len(word) :]), (1, new[len(word) :])]
    return segments


def _joined(segments: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for kind, text in segments:
        if not text:
            continue
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def distance(old: Sequence[str], new: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace (Levenshtein), by Myers' bit vectors.

    Myers, "A fast bit-vector algorithm for approximate string matching", J. ACM 46 (1999), with Hyyrö's
    (2003) change for whole strings: one step for each word of `new`, a bit for each word of `old`.
    """
    if not old:
        return len(new)
    where: dict[str, int] = {}
    for position, word in enumerate(old):
        where[word] = where.get(word, 0) | 1 << position
    last, mask = 1 << (len(old) - 1), (1 << len(old)) - 1
    up, down, found = mask, 0, len(old)  # up, down: where a column grows or falls by one
    for word in new:
        equal = where.get(word, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right, left = (down | ~(diagonal | up)) & mask, diagonal & up
        found += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(diagonal | right)) & mask, right & diagonal & mask
    return found
