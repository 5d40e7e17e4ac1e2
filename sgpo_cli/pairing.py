"""Which two texts make a preference pair, and which pairs teach nothing or the wrong thing.

A pairing is a name, the candidates it needs and a pure function from them to (chosen, rejected). Another
method is another function here; gen-pairs generates the candidates that are asked for and no others.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from sgpo_cli.configs import GenPairsConfig
from sgpo_cli.engines.base import Generation
from sgpo_cli.errors import UsageError
from sgpo_cli.gates import META_TALK, text_problem

Pair = tuple[Generation, Generation]
"""(chosen, rejected)"""


@dataclass(frozen=True)
class Pairing:
    """`choose` takes the candidates by name and returns (chosen, rejected).

    Args:
        columns: candidates that the data set brings.
        generated: candidates that models write: the policy's answer, the improver's improvement of it, and the
            answer of the initial policy M0.
    """

    columns: tuple[str, ...]
    generated: tuple[str, ...]
    choose: Callable[[Mapping[str, Generation]], Pair]


PAIRINGS = {
    # Improvement over the answer that was improved (arXiv 2507.20181).
    "sgpo": Pairing((), ("policy", "improver"), lambda texts: (texts["improver"], texts["policy"])),
    # Reference over the policy's answer (SPIN, arXiv 2401.01335).
    "spin": Pairing(("reference",), ("policy",), lambda texts: (texts["reference"], texts["policy"])),
    # The teacher's target over the answer it was made from.
    "distill": Pairing(("response", "target"), (), lambda texts: (texts["target"], texts["response"])),
    # Improvement of the policy's answer over that of the initial policy (SynPO, arXiv 2410.06961).
    "synpo": Pairing((), ("policy", "improver", "initial"), lambda texts: (texts["improver"], texts["initial"])),
    # A preference data set as it is: offline DPO.
    "labelled": Pairing(("chosen", "rejected"), (), lambda texts: (texts["chosen"], texts["rejected"])),
    # The policy's best over its worst answer, which `best_and_worst` finds.
    "best-worst": Pairing((), ("policy",), lambda texts: (texts["best"], texts["worst"])),
}


def best_and_worst(
    candidates: Sequence[Generation], scores: Sequence[float | None], control_tokens: Collection[str] = ()
) -> dict[str, Generation] | str:
    """The `best` and the `worst` of a prompt's candidates by score, or why there are none.

    Candidates that could not stand in a pair (cut, empty) do not compete, else the worst would mostly be one of
    them and the pair be dropped. Of equals the first counts.
    """
    problems = [text_problem(text, control_tokens) for text in candidates]
    usable = [place for place, problem in enumerate(problems) if problem is None]
    if len(usable) < 2:
        return next(problem for problem in problems if problem)
    scored = [(score, candidates[place]) for place in usable if (score := scores[place]) is not None]
    if len(scored) < 2:
        return "unscored"
    best, worst = max(scored, key=lambda each: each[0]), min(scored, key=lambda each: each[0])
    return "tie" if best[0] == worst[0] else {"best": best[1], "worst": worst[1]}


def check_options(config: GenPairsConfig) -> None:
    """Raises UsageError for options that do not go with the pairing: they would be read by nobody, or need more."""
    name, generated, count = config.pairing, PAIRINGS[config.pairing].generated, config.num_candidates
    unread = {
        "improver": config.improver is not None and "improver" not in generated,
        "improvement_steps": config.improvement_steps > 1 and "improver" not in generated,
        "initial": config.initial is not None and "initial" not in generated,
        "num_candidates": count > 1 and not generated,
        "scorer": config.scorer is not None and name != "best-worst",
    }
    for option, wrong in unread.items():
        if wrong:
            raise UsageError(f"option '{option}': pairing {name} makes no use of it", "leave it out")
    if name == "best-worst" and (config.scorer is None or count < 2):
        raise UsageError("pairing best-worst needs scorer, and num_candidates of 2 or more")
    if count > 1 and config.temperature == 0:
        raise UsageError("option 'num_candidates': at temperature 0 all candidates are the same", "raise temperature")


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
