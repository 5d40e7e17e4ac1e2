"""Which generated texts must not be trained on: pure functions from texts to a reason, or None."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sgpo_cli.engines.base import Generation
from sgpo_cli.errors import UsageError
from sgpo_cli.schema import FORBIDDEN, blank

# An introduction instead of an answer: a model would learn it within a few steps.
META_TALK = re.compile(
    r"\s*(sure|certainly|of course|absolutely|okay|ok)?[\s,!.:]*"
    r"(?:(here('s| is| are)|below is|this is|i('ve| have))\b.{0,40}"
    r"\b(improved|revised|better|corrected|updated|rewritten|enhanced|improvements?|rewrote|revision)\b"
    r"|\W{0,4}(improved|revised|corrected|updated|rewritten|enhanced)\s+(answer|response|version|text)\b\W{0,4}(:|\n))",
    re.IGNORECASE,
)
CERTAIN = 0.95
LETTERS = 60  # of fewer, a language is a guess
SHORT = 100  # characters of difference that are never too many


def text_problem(text: Generation, control_tokens: Collection[str] = ()) -> str | None:
    """Why a generated text cannot be trained on, or None."""
    if text.finish_reason not in ("stop", "length"):
        return text.finish_reason
    if blank(text.text):
        return "empty"
    if text.finish_reason == "length":
        return "cut"
    if FORBIDDEN.search(text.text):
        return "control_character"
    if any(token in text.text for token in control_tokens):
        return "control_token"
    return None


@dataclass(frozen=True)
class Target:
    """A target with the texts it was made from."""

    text: str
    response: str
    reference: str
    max_length_ratio: float


def _meta_talk(target: Target) -> bool:
    return bool(META_TALK.match(target.text)) and not META_TALK.match(target.response)


def _length_ratio(target: Target) -> bool:
    """Much longer than both others, or much shorter; of short texts, a ratio says little."""
    lengths = [len(text.strip()) for text in (target.response, target.reference)]
    length = len(target.text.strip())
    if max(length - max(lengths), min(lengths) - length) <= SHORT:
        return False
    return length > target.max_length_ratio * max(lengths) or length * target.max_length_ratio < min(lengths)


def _language(target: Target) -> bool:
    """Certainly another language than both the response and the reference."""
    language = _language_of(target.text)
    others = {_language_of(target.response), _language_of(target.reference)}
    return language is not None and None not in others and language not in others


GATES: dict[str, Callable[[Target], bool]] = {
    "unchanged": lambda target: target.text.strip() == target.response.strip(),
    "copy": lambda target: target.text.strip() == target.reference.strip(),
    "meta_talk": _meta_talk,
    "length_ratio": _length_ratio,
    "language": _language,
}


def check_gates(names: Collection[str]) -> list[str]:
    """The gates named, in our order.

    Raises:
        UsageError: there is no such gate.
    """
    if list(names) == ["none"]:
        return []
    if unknown := sorted(set(names) - set(GATES)):
        raise UsageError(f"no gate {unknown[0]!r}", f"gates: {', '.join(GATES)}; none for none")
    return [name for name in GATES if name in names]


def target_problem(row: Mapping[str, Any], gates: Collection[str], max_length_ratio: float) -> str | None:
    """The first gate that a row's target does not pass, or None."""
    target = Target(row["target"], row["response"], row["reference"], max_length_ratio)
    return next((name for name in gates if GATES[name](target)), None)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language_of(text: str) -> str | None:
    """The language of a text, or None where it is too short or too mixed to be certain."""
    if sum(map(str.isalpha, text)) < LETTERS and text.isascii():
        return None
    language, certainty = _identifier().classify(text[:2000])
    return str(language) if certainty >= CERTAIN else None
