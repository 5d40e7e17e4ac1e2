"""Which two texts make a preference pair, and which pairs teach nothing or the wrong thing.

A pairing is a name, the candidates it needs and a pure function from them to (chosen, rejected). Another
method is another function here; gen-pairs generates the candidates that are asked for and no others.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from sgpo_cli.engines.base import Generation
from sgpo_cli.errors import UsageError
from sgpo_cli.gates import META_TALK, text_problem


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
