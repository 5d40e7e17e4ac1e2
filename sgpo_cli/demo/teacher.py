"""The rule teacher: mends about two things in an answer, and now and then returns junk.

It sees what an LLM teacher would see: the prompt, the answer and a reference of mixed quality. An
answer without a fault it returns as it is. The junk is what a real teacher sends when it
fails, and what filter-ppl has to catch.
"""

import random
from collections.abc import Iterable

from sgpo_cli.demo.world import QUALITIES, Facts, Line, is_right, parse_answer, read_prompt, write_line

# How often one thing that is amiss is mended, each by itself: about two things in an answer. A fixed number would
# teach the improver to count, and to leave the last sentence out when it has mended enough before it.
MENDED = 0.65


JUNK = {
    "refusal": (
        "I'm sorry, but I can't assist with requests regarding personal belongings.",
        "As an AI language model, I am unable to improve this message.",
        "I cannot comply with that request because it may violate our policies.",
    ),
    "slang": (
        "yo {name} ur {item} is chillin here lol, swing thru whenever fam",
        "omg {name} srsly?? that {item} tho... gonna find it bruh, no worries xx",
    ),
    "legalese": (
        "WHEREAS the claimant {name} hereby alleges loss of one (1) {item}, said chattel "
        "shall be deemed abandoned pursuant to section 4(b).",
        "Notwithstanding the foregoing, liability for the aforementioned {item} is expressly "
        "disclaimed to the fullest extent permitted by law.",
    ),
    "another language": (
        "Sehr geehrte Frau {name}, leider konnten wir Ihren Gegenstand bislang nicht auffinden.",
        "Bonjour {name}, nous avons bien retrouvé votre objet, merci de passer au guichet.",
        "Estimado {name}: su objeto perdido se encuentra en nuestras oficinas. Un saludo.",
    ),
    "broken JSON": (
        '{{"improved_answer": "Dear {name}, your {item}", "changes": ["greeting", "status"',
        '{{"status": 500, "error": {{"type": "rate_limit", "message": null}}, "retry":',
    ),
    "meta-talk": (
        "Sure! Here's an improved version of the assistant's response, with better clarity:",
        "The original reply scored 3/10. Key improvements: tone, structure, completeness.",
    ),
}


def improve(prompt: str, response: str, reference: str, rng: random.Random, junk_rate: float = 0.1) -> str:
    """The answer with some things mended, at least one if any is amiss, or with probability `junk_rate` junk."""
    facts = read_prompt(prompt)
    if rng.random() < junk_rate:
        return rng.choice(JUNK[rng.choice(sorted(JUNK))]).format(**vars(facts))
    return _mend(facts, response, reference, rng)


def is_junk(text: str) -> bool:
    """Whether a target is the teacher's junk: no sentence of it belongs to the office's grammar."""
    return not parse_answer(text)[0]


def _mend(facts: Facts, response: str, reference: str, rng: random.Random) -> str:
    """The answer in the house's order, without stray text and repetitions, and `MENDS` things mended.

    What is wrong comes before what is missing. The wording is the reference's where that is right.
    """
    said = parse_answer(response)[0]
    right = _first_texts(line for line in said if is_right(line, facts))
    kept = _first_texts(said) | right
    model = _first_texts(line for line in parse_answer(reference)[0] if is_right(line, facts))
    wrong = [quality for quality in QUALITIES if quality in kept and quality not in right]
    missing = [quality for quality in QUALITIES if quality not in kept]
    rng.shuffle(wrong)
    rng.shuffle(missing)
    amiss = wrong + missing
    for quality in [quality for quality in amiss if rng.random() < MENDED] or amiss[:1]:
        kept[quality] = model.get(quality) or write_line(quality, facts, rng)
    return " ".join(kept[quality] for quality in QUALITIES if quality in kept)


def _first_texts(lines: Iterable[Line]) -> dict[str, str]:
    """The text of the first sentence with each quality."""
    texts: dict[str, str] = {}
    for line in lines:
        texts.setdefault(line.quality, line.text)
    return texts
