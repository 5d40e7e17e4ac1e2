"""The letters that reach the lost-property office, and the sentences its answers are made of.

A prompt is a letter with the clerk's register note in brackets; an answer is made of up to six
sentences, one for each quality in `QUALITIES`. Reference answers are of mixed quality, as human
data is: sentences are missing at random and some facts are wrong.
"""

import random
import re
from dataclasses import dataclass, replace
from typing import Any

NAMES = tuple("Ada Bela Clara Edvin Flora Hugo Ines Jonas Lena Marta Nadia Oskar Rosa Tomas".split())
COLOURS = tuple("green red blue yellow grey white black brown".split())
ITEMS = tuple("umbrella scarf hat lantern kettle violin teapot glove watch basket whistle compass diary coat".split())
PLACES = (
    "on the night tram",
    "at the fish market",
    "on the ferry",
    "by the lighthouse",
    "in the chapel",
    "at the bakery",
    "under the pier",
    "in the library",
)
SHELVES = tuple(str(number) for number in range(11, 25))
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday".split())

# No letter uses a word that begins a sentence of the answer grammar: what an answer already says
# is then easy to tell from what the letter says.
LETTERS = (
    "I am {name}. I left my {colour} {item} {place}.",
    "My name is {name} and I lost my {colour} {item} {place}.",
    "Good morning, this is {name}. I miss my {colour} {item} since I was {place}.",
    "I forgot my {colour} {item} {place}. Can you help me? With hope, {name}.",
    "Has anyone found my {colour} {item}? I had my eyes on a gull {place}. Kind regards, {name}.",
    "Good people, {place} I lost my {colour} {item}. Many thanks from {name}.",
)
REGISTER = {
    True: "[Register: found, shelf {shelf}]",
    False: "[Register: not found, ask on {day}]",
}

# The grammar of an answer: the wordings of each quality, in the order in which a letter has them.
# `status` and `detail` have one list for a found thing and one for a missing one.
QUALITIES = ("greeting", "item", "status", "detail", "kindness", "closing")
GREETINGS = ("Dear {name}!", "Dear {name}, good day!")
ITEM_LINES = ("We looked for your {colour} {item}.", "We read about your {colour} {item}.")
STATUS_LINES = {
    True: ("It is safe with us.", "It is here, dry and well."),
    False: ("It is still missing.", "It is not here yet."),
}
DETAIL_LINES = {
    True: ("Please collect it from shelf {shelf}.", "Please come to shelf {shelf}."),
    False: ("Please ask again on {day}.", "Please look in on {day}."),
}
KIND_LINES = (
    "The gulls send their regards.",
    "The harbour cat feels with you.",
    "The tea at our counter is on us.",
)
CLOSINGS = ("Yours, the Harbour Lost Property Office",)

# How often a reference answer has each quality. Uneven, so that the likeliest answer of a model
# that learns from them is not a good one either.
PRESENT = {
    "greeting": 0.5,
    "item": 0.3,
    "status": 0.52,
    "detail": 0.42,
    "kindness": 0.3,
    "closing": 0.52,
}
WRONG = 0.05  # how often the clerk misreads the name, the thing, the register note


Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a letter and its register note say; `shelf` counts if `found`, `day` if not."""

    name: str
    colour: str
    item: str
    found: bool
    shelf: str
    day: str


@dataclass(frozen=True)
class Line:
    """One sentence of an answer: the quality it belongs to, its text and the facts it states."""

    quality: str
    text: str
    stated: dict[str, str | bool]


def wordings(quality: str, found: bool) -> tuple[str, ...]:
    """The sentences, with {slots}, that give an answer this quality."""
    table = {
        "greeting": GREETINGS,
        "item": ITEM_LINES,
        "status": STATUS_LINES[found],
        "detail": DETAIL_LINES[found],
        "kindness": KIND_LINES,
        "closing": CLOSINGS,
    }
    return table[quality]


def write_line(quality: str, facts: Facts, rng: random.Random) -> str:
    """A sentence with this quality, in one of its wordings."""
    return rng.choice(wordings(quality, facts.found)).format(**vars(facts))


def _patterns() -> list[tuple[str, bool | None, re.Pattern[str]]]:
    """(quality, the status it implies or None, pattern) for every wording of the grammar."""
    found_matters = ("status", "detail")
    patterns = []
    for quality in QUALITIES:
        for found in (True, False) if quality in found_matters else (None,):
            for wording in wordings(quality, bool(found)):
                regex = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(wording))
                patterns.append((quality, found, re.compile(regex)))
    return patterns


PATTERNS = _patterns()


def parse_answer(text: str) -> tuple[list[Line], list[str]]:
    """The known sentences of an answer in order, and the stray text between them."""
    hits = []
    for quality, found, pattern in PATTERNS:
        for match in pattern.finditer(text):
            stated: dict[str, str | bool] = dict(match.groupdict())
            if found is not None:
                stated["found"] = found
            hits.append((match.start(), match.end(), Line(quality, match.group(), stated)))
    lines, strays, position = [], [], 0
    for start, end, line in sorted(hits, key=lambda hit: hit[:2]):
        if start < position:
            continue
        strays.append(text[position:start])
        lines.append(line)
        position = end
    strays.append(text[position:])
    return lines, [stray.strip() for stray in strays if stray.strip()]


def is_right(line: Line, facts: Facts) -> bool:
    """Whether all that the sentence states is what the letter and the register say."""
    return all(getattr(facts, key) == value for key, value in line.stated.items())


def read_prompt(prompt: str) -> Facts:
    """The facts of a letter, read from its text.

    Raises ValueError if it is not a letter of this world.
    """
    letter, _, register = prompt.partition("[Register:")
    words = re.findall(r"\w+", letter)
    note = re.findall(r"\w+", register)
    return Facts(
        name=_only(words, NAMES, prompt),
        colour=_only(words, COLOURS, prompt),
        item=_only(words, ITEMS, prompt),
        found="not" not in note,
        shelf=_only(note, SHELVES, prompt) if "not" not in note else "",
        day=_only(note, DAYS, prompt) if "not" in note else "",
    )


def _only(words: list[str], vocabulary: tuple[str, ...], prompt: str) -> str:
    """The one word of the vocabulary that occurs."""
    hits = [word for word in words if word in vocabulary]
    if len(hits) != 1:
        raise ValueError(f"not a letter to the lost-property office: {prompt!r}")
    return hits[0]


def draw_facts(rng: random.Random) -> Facts:
    """The facts of a new letter."""
    found = rng.random() < 0.5
    return Facts(
        name=rng.choice(NAMES),
        colour=rng.choice(COLOURS),
        item=rng.choice(ITEMS),
        found=found,
        shelf=rng.choice(SHELVES) if found else "",
        day=rng.choice(DAYS) if not found else "",
    )


def write_prompt(facts: Facts, rng: random.Random) -> str:
    """A letter that states the facts, with the register note."""
    letter = rng.choice(LETTERS).format(place=rng.choice(PLACES), **vars(facts))
    return f"{letter} {REGISTER[facts.found].format(**vars(facts))}"


def ideal_answer(facts: Facts, rng: random.Random) -> str:
    """An answer with all six qualities."""
    return " ".join(write_line(quality, facts, rng) for quality in QUALITIES)


def mixed_answer(facts: Facts, rng: random.Random) -> str:
    """A reference answer of mixed quality: at least two sentences, of which any may be wrong."""
    present = [quality for quality in QUALITIES if rng.random() < PRESENT[quality]]
    while len(present) < 2:
        present = [quality for quality in QUALITIES if rng.random() < PRESENT[quality]]
    believed = _misread(facts, rng)
    return " ".join(write_line(quality, believed, rng) for quality in present)


def _misread(facts: Facts, rng: random.Random) -> Facts:
    """The facts as a hasty clerk reads them."""
    name, item, detail = draw_facts(rng), draw_facts(rng), draw_facts(rng)
    if rng.random() < WRONG:
        facts = replace(facts, name=name.name)
    if rng.random() < WRONG:
        facts = replace(facts, colour=item.colour, item=item.item)
    if rng.random() < WRONG or (facts.found == detail.found and rng.random() < WRONG):
        facts = replace(facts, found=detail.found, shelf=detail.shelf, day=detail.day)
    return facts


def make_splits(seed: int, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Rows for each split, with prompts that no two splits share.

    `prompts` has no completion, `heldout` has an ideal one, any other split has references of
    mixed quality.
    """
    rng = random.Random(f"lost property {seed}")
    seen: set[str] = set()
    return {split: _make_rows(split, size, rng, seen) for split, size in sizes.items()}


def _make_rows(split: str, size: int, rng: random.Random, seen: set[str]) -> list[Row]:
    """The rows of one split; their prompts are added to `seen`."""
    rows: list[Row] = []
    while len(rows) < size:
        facts = draw_facts(rng)
        prompt = write_prompt(facts, rng)
        if prompt in seen:
            continue
        seen.add(prompt)
        row: Row = {"id": f"{split}-{len(rows) + 1:05d}"}
        row["prompt"] = [{"role": "user", "content": prompt}]
        if split != "prompts":
            answer = ideal_answer if split == "heldout" else mixed_answer
            row["completion"] = [{"role": "assistant", "content": answer(facts, rng)}]
        rows.append(row)
    return rows


def labelled_pairs(rows: list[Row], seed: int, size: int) -> list[Row]:
    """Preference pairs for the prompts of `rows`: of two references of mixed quality, the better over the worse.

    Drawn from a stream of their own, in the order of the rows; where both are as good, there is no pair.

    Raises ValueError if the rows do not give `size` pairs.
    """
    from sgpo_cli.demo.scorer import score  # which reads this world

    rng = random.Random(f"labelled pairs {seed}")
    pairs: list[Row] = []
    for row in rows:
        if len(pairs) == size:
            break
        prompt = row["prompt"][0]["content"]
        drawn = [mixed_answer(read_prompt(prompt), rng) for _ in range(2)]
        worse, better = sorted(drawn, key=lambda answer: score(prompt, answer))
        if score(prompt, worse) < score(prompt, better):
            texts = {"chosen": better, "rejected": worse}
            sides = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
            pairs.append({"id": row["id"], "prompt": row["prompt"], **sides})
    if len(pairs) < size:
        raise ValueError(f"{len(rows)} prompts give {len(pairs)} labelled pairs, {size} were asked for")
    return pairs
