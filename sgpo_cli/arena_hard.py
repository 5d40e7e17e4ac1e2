"""Arena-Hard v2's score: win rates with the effect of style taken out. Pure functions on arrays and texts.

The published script fits a Bradley-Terry model to all battles. Two things are done differently here: it
resamples battles, so that two games about one prompt count as independent and its intervals come out too
narrow; here prompts are resampled, with all their battles. And asked to control for length alone, or for
markdown alone, it keeps the wrong columns of its feature matrix; here each is what it says.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgpo_cli.winrates import Array, fit_logistic, interval, logistic, resampled

CODE_BLOCK = re.compile(r"```[^`]*```")
HEADER = re.compile(r"^(#{1,6})\s", re.MULTILINE)
ORDERED, UNORDERED = re.compile(r"^\s*\d+\.\s", re.MULTILINE), re.compile(r"^\s*[-*+]\s", re.MULTILINE)
STARS, UNDERSCORES = re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__")
TOKEN = re.compile(r"\w+|[^\w\s]")
STRONG = 3  # games that a "much better" counts as
CONTROLS = {"length": [0], "markdown": [1, 2, 3]}

Style = dict[str, Any]


def style_of(text: str) -> Style:
    """An answer's `metadata` as Arena-Hard has it: length and markdown outside of code blocks.

    `token_len` counts words and marks, not the tokens of one vendor's vocabulary; only ratios of it are used.
    """
    prose = CODE_BLOCK.sub("", text)
    marks = [len(mark) for mark in HEADER.findall(prose)]
    return {
        "token_len": len(TOKEN.findall(text)),
        "header_count": {f"h{level}": marks.count(level) for level in range(1, 7)},
        "list_count": {"ordered": len(ORDERED.findall(prose)), "unordered": len(UNORDERED.findall(prose))},
        "bold_count": {"**": len(STARS.findall(prose)), "__": len(UNDERSCORES.findall(prose))},
    }


def style_difference(model: Style, baseline: Style) -> list[float]:
    """Length, headers, lists and bold text of one answer against the other, each in -1..1.

    Length: (a - b) / (a + b). The others, with the density d = count / (token_len + 1):
    (d_a - d_b) / (d_a + d_b + 1).
    """
    own, other = model["token_len"], baseline["token_len"]
    differences = [(own - other) / (own + other) if own + other else 0.0]
    for name in ("header_count", "list_count", "bold_count"):
        mine, theirs = _total(model[name]) / (own + 1), _total(baseline[name]) / (other + 1)
        differences.append((mine - theirs) / (mine + theirs + 1))
    return differences


def _total(counts: dict[str, int] | int) -> int:
    return counts if isinstance(counts, int) else sum(counts.values())


def outcome_of(label: str) -> tuple[float, int] | None:
    """A judgment such as "A>>B" as (1 where A won, how many games it counts as); None for no verdict."""
    found = re.fullmatch(r"([AB])(>>|>|=|<|<<)([AB])", label)
    if found is None or found[1] == found[3]:
        return None
    if found[2] == "=":
        return 0.5, 1
    first_won = found[2].startswith(">")
    return float(first_won == (found[1] == "A")), STRONG if len(found[2]) == 2 else 1


@dataclass(frozen=True)
class Battles:
    """Games of models against one baseline, a line per game.

    Args:
        model: which model played, counted from 0, [games].
        prompt: about which prompt, counted from 0, [games].
        outcome: 1 where the model won, 0.5 for a tie, [games].
        copies: how many games it counts as, [games].
        style: `style_difference` of the two answers, [games, 4].
    """

    model: NDArray[np.int64]
    prompt: NDArray[np.int64]
    outcome: Array
    copies: Array
    style: Array


def scores(
    battles: Battles, models: int, seed: int, control: Sequence[str] = ("length", "markdown")
) -> list[tuple[float, tuple[float, float]]]:
    """Each model's score in 0..1 with its 95 % interval.

    With style control: s(b_m) of the Bradley-Terry model P(model m wins) = s(b_m + c z), where z are the
    style differences, standardised over all games. Without: the mean outcome.

    Args:
        control: what to take out, of `CONTROLS`.
    """
    members = np.eye(models)[battles.model]
    columns = [column for name in control for column in CONTROLS[name]]
    features = np.hstack([members, _standardised(battles.style[:, columns], battles.copies)])

    def rate(counts: Array) -> Array:
        weights = counts[:, battles.prompt] * battles.copies
        if not columns:
            return np.asarray((weights * battles.outcome) @ members / (weights @ members))
        return logistic(fit_logistic(features, battles.outcome, weights)[:, :models])

    prompts = int(battles.prompt.max()) + 1
    point, draws = rate(np.ones((1, prompts)))[0], resampled(rate, prompts, seed)
    return [(float(point[number]), interval(draws[:, number])) for number in range(models)]


def _standardised(values: Array, copies: Array) -> Array:
    """Each column with mean 0 and standard deviation 1; a column without spread becomes 0."""
    games = copies.sum()
    centred = values - copies @ values / games
    spread = np.sqrt(copies @ centred**2 / max(games - 1, 1))
    return np.asarray(centred / np.where(spread == 0, 1, spread))
