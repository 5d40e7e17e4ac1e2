"""Which two texts make a preference pair, and which pairs teach nothing or the wrong thing.

A pairing is a name, the candidates it needs and a pure function from them to (chosen, rejected). Another
method is another function here; gen-pairs generates the candidates that are asked for and no others.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from sgpo_cli.engines.base import Generation
from sgpo_cli.errors import UsageError
from sgpo_cli.schema import FORBIDDEN, blank

# An introduction instead of an answer: DPO would learn it within a few steps.
META_TALK = re.compile(
    r"\s*(sure|certainly|of course|okay|ok)?[\s,!.:]*(here('s| is| are)|below is|this is)\b.{0,40}"
    r"\b(improved|revised|better|corrected|updated|rewritten|enhanced)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pairing:
    """`choose` takes the candidates by name and returns (chosen, rejected)."""

    candidates: tuple[str, ...]
    choose: Callable[[Mapping[str, Generation]], tuple[Generation, Generation]]


PAIRINGS = {
    "sgpo": Pairing(("policy", "improver"), lambda texts: (texts["improver"], texts["policy"])),
}


def find_pairing(name: str) -> Pairing:
    """Raises UsageError for an unknown name."""
    if name not in PAIRINGS:
        raise UsageError(f"no pairing '{name}'", f"pairings: {', '.join(PAIRINGS)}")
    return PAIRINGS[name]


def text_problem(text: Generation, control_tokens: Collection[str] = ()) -> str | None:
    """Why a generated text cannot be trained on, or None."""
    if text.finish_reason == "too_long":
        return "too_long"
    if blank(text.text):
        return "empty"
    if text.finish_reason == "length":
        return "cut"
    if FORBIDDEN.search(text.text):
        return "control_character"
    if any(token in text.text for token in control_tokens):
        return "control_token"
    return None


def pair_problem(
    chosen: Generation, rejected: Generation, max_length_ratio: float, control_tokens: Collection[str] = ()
) -> str | None:
    """Why a pair is dropped, or None.

    A cut text teaches "be short", an identical pair nothing, an introduction to be talkative.
    """
    for text in (chosen, rejected):
        if problem := text_problem(text, control_tokens):
            return problem
    first, second = chosen.text.strip(), rejected.text.strip()
    if first == second:
        return "identical"
    if META_TALK.match(first) and not META_TALK.match(second):
        return "meta_talk"
    if max(len(first), len(second)) > max_length_ratio * min(len(first), len(second)):
        return "length_ratio"
    return None
