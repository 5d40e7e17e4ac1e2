"""What is said of a step's rows: the measures against known cases, the warnings where a user needs them."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_lines

from sgpo_cli import quality
from sgpo_cli.comparison import differences, distance
from sgpo_cli.errors import IntegrityError
from sgpo_cli.measures import edit_share, histogram, openings, repetition, script, sketch

WORDS = [f"word{number}" for number in range(3000)]


def text(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(WORDS, k=words)) + "."


def pair(number: int, rejected: str, chosen: str, prompt: str = "") -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "prompt": [{"role": "user", "content": prompt or f"Tell me about thing number {number} of them all."}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def described(directory: Path, rows: list[dict[str, Any]], dropped: list[dict[str, Any]] | None = None) -> Any:
    write_lines(directory / "train.jsonl", rows)
    write_lines(directory / "rejects.jsonl", dropped or [])
    return quality.describe(directory)


def healthy(count: int = 300) -> list[dict[str, Any]]:
    """Pairs that nothing is wrong with."""
    dice = random.Random(1)
    rows = []
    for number in range(count):
        words = text(dice, 40).split()
        better = [dice.choice(WORDS) if dice.random() < 0.3 else word for word in words]
        rows.append(pair(number, " ".join(words), " ".join(better)))
    return rows


def levenshtein(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_distance_is_levenshteins() -> None:
    dice = random.Random(3)
    for _ in range(500):
        first, second = (dice.choices("abcd", k=dice.randint(0, 14)) for _ in range(2))
        assert distance(first, second) == levenshtein(first, second)


def test_differences_make_up_both_texts_again_whatever_the_white_space() -> None:
    dice = random.Random(4)
    for _ in range(500):
        old, new = ("".join(dice.choices("ab \n\t", k=dice.randint(0, 20))) for _ in range(2))
        found = differences(old, new)
        assert "".join(part for kind, part in found if kind <= 0) == old
        assert "".join(part for kind, part in found if kind >= 0) == new


def test_only_the_words_that_differ_are_marked() -> None:
    assert differences("All is well.", "All is really well. Thanks.") == [
        (0, "All is "), (1, "really "), (0, "well."), (1, " Thanks."),
    ]  # fmt: skip


def test_runaway_repetition_is_compared_in_no_time() -> None:
    started = time.monotonic()
    differences("a " * 5000, "a b " * 2500)
    assert time.monotonic() - started < 1


def test_measures_on_known_texts() -> None:
    assert edit_share("a b c d", "a b x d") == 0.25
    assert edit_share("", "") == 0
    assert repetition("one two three four five six".split()) == 0
    assert repetition("one two three four ".split() * 10) > 0.8
    assert script("Это по-русски, конечно") == "CYRILLIC"
    assert script("これは日本語の文章です") == "CJK"
    assert script("1, 2, 3: go") == ""
    assert histogram([-9, 0, 0.5, 99], 0, 1, 2)["counts"] == [2, 2]


def test_a_sketch_tells_copies_from_others() -> None:
    dice = random.Random(5)
    long = text(dice, 300)
    assert sketch(long) == sketch(long.replace(" ", "  "))
    assert sketch(long) != sketch(text(dice, 300))
    copies = 0
    for _ in range(100):
        words = text(dice, 300).split()
        copy = [*words]
        copy[dice.randrange(300)] = "other"
        copies += sketch(" ".join(words)) == sketch(" ".join(copy))
    assert copies > 65  # one word of 300 leaves 291 of 301 shingles in both; to the power of six, 0.82


def test_openings_are_those_of_the_new_texts_only() -> None:
    new = ["Sure, here is it: one"] * 30 + [f"Number {number} is this" for number in range(70)]
    old = [f"Number {number} is that" for number in range(100)]
    assert openings(old, new) == [{"words": "sure here is", "new": 0.3, "old": 0.0}]
    assert openings(new, new) == []


def test_healthy_pairs_get_no_warning(tmp_path: Path) -> None:
    found = described(tmp_path, healthy())
    assert found["warnings"] == []
    assert found["rows"] == found["sampled"] == 300
    assert 0.2 < found["pair"]["edit_share"]["median"] < 0.4
    assert sum(found["pair"]["edit_histogram"]["counts"]) == 300
    assert found["texts"]["chosen"]["words"]["median"] == 40


DICE = random.Random(6)
AILMENTS = {
    "unchanged": lambda row, n: pair(n, row["chosen"][0]["content"], row["chosen"][0]["content"]),
    "times as long as": lambda row, n: pair(n, "Short.", row["chosen"][0]["content"]),
    'begin with "sure here is"': lambda row, n: pair(
        n, row["rejected"][0]["content"], "Sure, here is what you want: " + row["chosen"][0]["content"]
    ),
    "chosen texts repeat themselves": lambda row, n: pair(n, row["rejected"][0]["content"], "so it goes on and " * 8),
    "another script than their prompt": lambda row, n: pair(n, "Nein, das weiß ich nicht.", "Нет, я этого не знаю."),
    "prompt texts are near copies": lambda row, n: pair(
        n, text(DICE, 40), text(DICE, 40), "Please write a poem about the sea for my mother today."
    ),
    "a weak signal": lambda row, n: pair(n, row["chosen"][0]["content"], row["chosen"][0]["content"] + " Yes."),
}


@pytest.mark.parametrize("sentence", AILMENTS)
def test_what_is_wrong_is_said(tmp_path: Path, sentence: str) -> None:
    rows = [AILMENTS[sentence](row, number) for number, row in enumerate(healthy())]
    assert any(sentence in warning for warning in described(tmp_path, rows)["warnings"])


def test_cut_texts_are_counted_from_the_rejects(tmp_path: Path) -> None:
    found = described(tmp_path, healthy(90), [{"id": f"r{n}", "reason": "cut"} for n in range(10)])
    assert found["cut"] == 0.1
    assert any("max_new_tokens" in warning for warning in found["warnings"])


def test_the_perplexity_histogram_holds_every_row(tmp_path: Path) -> None:
    rows = [{**row, "log_ppl": 0.2 + number / 1000} for number, row in enumerate(healthy(100))]
    found = described(tmp_path, rows, [{**rows[0], "log_ppl": 15.0, "reason": "implausible"}] * 7)["log_ppl"]
    assert sum(found["kept"]["counts"]) == 100
    assert found["dropped"]["counts"][-1] == 7
    assert found["kept"]["high"] < 1  # junk far out leaves the kept ones to be seen


def test_the_same_rows_give_the_same_numbers_in_any_process(tmp_path: Path) -> None:
    described(tmp_path, healthy())
    code = "import json, pathlib; from sgpo_cli import quality as q; print(json.dumps(q.describe(pathlib.Path())))"
    seen = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        seen.add(done.stdout)
    assert seen == {json.dumps(quality.describe(tmp_path)) + "\n"}


def test_no_rows_and_broken_rows(tmp_path: Path) -> None:
    assert quality.describe(tmp_path) is None
    assert described(tmp_path, []) is None
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(IntegrityError, match=r"train\.jsonl:2: expected a JSON object"):
        quality.describe(tmp_path)
    (tmp_path / "train.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(IntegrityError, match=r"train\.jsonl:1"):
        quality.describe(tmp_path)


def test_facts_for_the_manifest_log_what_looks_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [pair(number, "Short.", row["chosen"][0]["content"]) for number, row in enumerate(healthy())]
    described(tmp_path, rows)
    assert quality.facts(tmp_path)["quality"]["rows"] == 300
    assert "times as long as rejected" in caplog.text
