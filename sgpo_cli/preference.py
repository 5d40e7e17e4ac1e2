"""The improver as a judge of two answers: which of the two would it rather give, whichever of them it is shown?

Needs no second model. A good improver moves from the worse answer to the better one and leaves the better one as
it is; one that would change a good answer back prefers neither.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgpo_cli import prompts
from sgpo_cli.prompts import Message

if TYPE_CHECKING:
    from sgpo_cli.scoring import Scorer


def margins(
    scorer: "Scorer", request: str, asked: Sequence[list[Message]], first: Sequence[str], second: Sequence[str]
) -> list[tuple[float, float]]:
    """How much rather the improver gives the first answer than the second: shown the second, shown the first.

    Args:
        request: what asks for an improvement.

    Returns:
        differences of mean log-probabilities per token (nats); NaN for a text without tokens.
    """
    found = []
    for shown in (second, first):
        turns = [prompts.improve(prompt, text, request) for prompt, text in zip(asked, shown, strict=True)]
        own, other = scorer.score(turns, first), scorer.score(turns, second)
        found.append([theirs.log_ppl - ours.log_ppl for ours, theirs in zip(own, other, strict=True)])
    return list(zip(*found, strict=True))


def preferred(shown_second: float, shown_first: float) -> int:
    """1 for the first answer, -1 for the second, 0 where it depends on which of them is shown."""
    if math.isnan(shown_second + shown_first):
        return 0
    return (min(shown_second, shown_first) > 0) - (max(shown_second, shown_first) < 0)
