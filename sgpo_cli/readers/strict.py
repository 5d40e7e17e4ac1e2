"""Strict values: JSON without the liberties of JSON parsers, and text that is safe to show.

Knows nothing of files, columns or rows of ours.
"""

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 64
INTEGERS = range(-(2**63), 2**64)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# What a terminal obeys or does not show: control characters but tab and line feed, marks and overrides of direction,
# invisible format characters but the two joiners that scripts need, line separators, halves of characters.
STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff\ud800-\udfff]"
)


class Fault(Exception):
    """A record is unusable: a word to count it by, a sentence for its owner, the column if it has one."""

    def __init__(self, reason: str, message: str, column: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.column = column


def shown(value: object, limit: int = 60) -> str:
    """A value from a file, quoted, short, and without anything that a terminal would obey."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(path: str) -> str:
    """A path as it is, or escaped when it holds control characters."""
    return path if path.isprintable() else repr(path)[1:-1]


def visible(text: str) -> str:
    """A text for a terminal: whatever steers it or turns its order around is escaped; lines stay lines."""
    return STEERS.sub(lambda found: ascii(found[0])[1:-1], text)


def strict_json(text: str) -> Any:
    """The JSON value of a text; duplicate keys, NaN, lone surrogates and the like are Faults."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = "control_character" if error.msg.startswith("Invalid control character") else "bad_json"
        raise Fault(reason, f"not valid JSON: {error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise Fault("too_deep", f"nested more than {MAX_DEPTH} levels deep") from None
    # Only an escape can smuggle in half a character, and most rows have neither escapes nor depth.
    if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
        for column, item in value.items() if isinstance(value, dict) else [("", value)]:
            check_value(column, item)
    return value


def check_value(column: str, value: object) -> None:
    """Fault unless the value can be written as one line of UTF-8 JSON and read back the same."""
    pending = [(value, 1), (column, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            if LONE_SURROGATE.search(item):
                raise Fault("lone_surrogate", f"half a surrogate pair in {shown(item)}", column)
        elif isinstance(item, float) and not math.isfinite(item):
            raise Fault("bad_number", f"{item} is not a JSON number", column)
        elif isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                raise Fault("too_deep", f"nested more than {MAX_DEPTH} levels deep", column)
            parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            pending.extend((part, depth + 1) for part in parts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise Fault("duplicate_key", "the key is there twice in one object", double)
    return value


def _integer(digits: str) -> int:
    # Long digit strings first: int() itself refuses them, or takes quadratic time.
    if len(digits) > 20 or int(digits) not in INTEGERS:
        raise Fault("bad_number", f"the integer {shown(digits)} does not fit in 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise Fault("bad_number", f"the number {shown(digits)} is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise Fault("bad_number", f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
