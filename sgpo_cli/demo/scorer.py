"""Judges an answer of the lost-property office by rule, from the prompt and the answer alone.

A quality counts if exactly one sentence of the answer has it and what that sentence states is
right. Saying everything twice, in both statuses or with guessed facts therefore earns nothing.
"""

from itertools import pairwise

from sgpo_cli.demo.world import QUALITIES, Facts, Line, is_right, parse_answer, read_prompt

FAULT = 0.1  # what a wrong, repeated or misplaced sentence costs, and each piece of stray text
STRAY_WORDS = 5  # a piece of stray text


def qualities(prompt: str, response: str) -> dict[str, bool]:
    """Which of the six qualities the answer has."""
    facts = read_prompt(prompt)
    lines, _ = parse_answer(response)
    return {quality: _has(quality, lines, facts) for quality in QUALITIES}


def _has(quality: str, lines: list[Line], facts: Facts) -> bool:
    """Whether one sentence, and a right one, has the quality."""
    own = [line for line in lines if line.quality == quality]
    return len(own) == 1 and is_right(own[0], facts)


def score(prompt: str, response: str) -> float:
    """0..1: the share of qualities, less `FAULT` for each fault."""
    facts = read_prompt(prompt)
    lines, strays = parse_answer(response)
    held = sum(_has(quality, lines, facts) for quality in QUALITIES)
    wrong = sum(not is_right(line, facts) for line in lines)
    order = [QUALITIES.index(line.quality) for line in lines]
    repeated = len(order) - len(set(order))
    misplaced = sum(later < earlier for earlier, later in pairwise(order))
    stray = sum(1 + len(text.split()) // STRAY_WORDS for text in strays)
    faults = wrong + repeated + misplaced + stray
    return max(0.0, held / len(QUALITIES) - FAULT * faults)
