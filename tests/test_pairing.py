"""What makes a pair, and what is dropped."""

from typing import get_args, get_type_hints

import pytest

from sgpo_cli.configs import GenPairsConfig
from sgpo_cli.engines.base import Generation
from sgpo_cli.pairing import PAIRINGS, best_and_worst, pair_problem, text_problem


def text(words: str, finish: str = "stop") -> Generation:
    return Generation(words, finish)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "chosen", "rejected"),
    [
        ("sgpo", "improver", "policy"),
        ("spin", "reference", "policy"),
        ("distill", "target", "response"),
        ("synpo", "improver", "initial"),
        ("labelled", "chosen", "rejected"),
        ("best-worst", "best", "worst"),
    ],
)
def test_which_text_each_pairing_prefers(name: str, chosen: str, rejected: str) -> None:
    candidates = {each: text(each) for each in (*PAIRINGS[name].columns, *PAIRINGS[name].generated, chosen, rejected)}
    assert [each.text for each in PAIRINGS[name].choose(candidates)] == [chosen, rejected]


def test_every_pairing_can_be_asked_for() -> None:
    assert get_args(get_type_hints(GenPairsConfig)["pairing"]) == tuple(PAIRINGS)


@pytest.mark.parametrize(
    ("candidates", "scores", "found"),
    [
        (["a", "b", "c"], [0.5, 0.9, 0.1], ("b", "c")),
        (["a", "b", "c", "d"], [0.1, 0.9, 0.9, 0.1], ("b", "a")),
        (["a", "b", "c"], [None, 0.9, 0.1], ("b", "c")),
        (["a", "", "c"], [0.5, 0.0, 0.1], ("a", "c")),
        (["a", "b"], [0.5, 0.5], "tie"),
        (["a", "b", "c"], [None, None, 0.5], "unscored"),
        (["a", "", ""], [0.5, 0.1, 0.1], "empty"),
    ],
)
def test_best_and_worst_of_the_usable_candidates(
    candidates: list[str], scores: list[float | None], found: tuple[str, str] | str
) -> None:
    pair = best_and_worst(list(map(text, candidates)), scores)
    assert (pair if isinstance(pair, str) else (pair["best"].text, pair["worst"].text)) == found


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (text("a better answer"), text("an answer"), None),
        (text("the same "), text(" the same"), "identical"),
        (text(""), text("an answer"), "empty"),
        (text("an answer"), text(" \u200b"), "empty"),
        (text("an answer that was", "length"), text("an answer"), "cut"),
        (text("fine"), text("cut in the mid", "length"), "cut"),
        (text("bell \x07 rings"), text("an answer"), "control_character"),
        (text("stop <|im_end|> here"), text("an answer"), "control_token"),
        (text("Sure! Here's the improved answer: yes"), text("an answer is yes"), "meta_talk"),
        (text("Here is a revised version: yes"), text("Here is an improved version: no"), None),
        (text("Here is the shop you asked for."), text("The shop is gone, I fear."), None),
        (text("word " * 40), text("word"), "length_ratio"),
    ],
)
def test_pairs_that_teach_nothing_or_the_wrong_thing_are_dropped(
    chosen: Generation, rejected: Generation, reason: str | None
) -> None:
    assert pair_problem(chosen, rejected, 3.0, ["<|im_end|>"]) == reason


def test_a_cut_text_counts_as_cut_even_when_it_looks_complete() -> None:
    assert text_problem(text("It looks complete.", "length")) == "cut"
