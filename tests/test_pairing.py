"""What makes a pair, and what is dropped."""

import pytest

from sgpo_cli.engines.base import Generation
from sgpo_cli.pairing import find_pairing, pair_problem, text_problem


def text(words: str, finish: str = "stop") -> Generation:
    return Generation(words, finish)  # type: ignore[arg-type]


def test_sgpo_prefers_the_improvement() -> None:
    candidates = {"policy": text("an answer"), "improver": text("a better answer")}
    chosen, rejected = find_pairing("sgpo").choose(candidates)
    assert (chosen.text, rejected.text) == ("a better answer", "an answer")


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
