"""The demo world: a judge that cannot be talked round, a teacher that helps a little, splits that do not overlap."""

import random
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import read_lines, run_stage

from sgpo_cli.demo.scorer import qualities, score
from sgpo_cli.demo.teacher import JUNK, improve, is_junk
from sgpo_cli.demo.world import QUALITIES, labelled_pairs, make_splits, parse_answer, read_prompt
from sgpo_cli.errors import UsageError

SIZES = {"sft": 300, "prompts": 200, "heldout": 100}
SPLITS = make_splits(5, SIZES)
PAIRS = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in SPLITS["heldout"]]
MIXED = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in SPLITS["sft"]]


def test_splits_have_their_sizes_and_share_no_prompt() -> None:
    assert {name: len(rows) for name, rows in SPLITS.items()} == SIZES
    texts = [row["prompt"][0]["content"] for rows in SPLITS.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_a_seed_is_a_world() -> None:
    assert make_splits(5, SIZES) == SPLITS
    assert make_splits(6, SIZES) != SPLITS


def test_labelled_pairs_are_two_references_the_better_over_the_worse() -> None:
    pairs = labelled_pairs(SPLITS["sft"], 5, 200)
    assert (len(pairs), pairs) == (200, labelled_pairs(SPLITS["sft"], 5, 200))
    for pair in pairs:
        prompt = pair["prompt"][0]["content"]
        chosen, rejected = (score(prompt, pair[side][0]["content"]) for side in ("chosen", "rejected"))
        assert chosen > rejected
    assert make_splits(5, SIZES) == SPLITS
    with pytest.raises(ValueError, match="300 prompts give"):
        labelled_pairs(SPLITS["sft"], 5, 300)


def test_an_ideal_answer_scores_one_and_references_about_the_middle() -> None:
    assert {score(*pair) for pair in PAIRS} == {1.0}
    assert 0.4 < statistics.mean(score(*pair) for pair in MIXED) < 0.55


def test_each_sentence_is_a_quality_of_its_own() -> None:
    prompt, answer = PAIRS[0]
    lines, strays = parse_answer(answer)
    assert not strays
    for left_out in lines:
        rest = " ".join(line.text for line in lines if line is not left_out)
        assert score(prompt, rest) == pytest.approx(5 / 6)
        assert [name for name, has in qualities(prompt, rest).items() if not has] == [left_out.quality]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer, other: answer + " " + answer,
        lambda answer, other: answer + " " + other,
        lambda answer, other: " ".join(reversed([line.text for line in parse_answer(answer)[0]])),
        lambda answer, other: answer + " As an AI language model, I hope that this helps you a lot today!",
        lambda answer, other: '{"answer": "' + answer + '"}',
        lambda answer, other: other,
    ],
    ids=["twice", "two answers", "backwards", "with talk", "as JSON", "somebody else's"],
)
def test_the_judge_cannot_be_talked_round(spoil) -> None:
    for (prompt, answer), (other_prompt, other) in pairwise(PAIRS):
        if other != answer and read_prompt(prompt) != read_prompt(other_prompt):
            assert score(prompt, spoil(answer, other)) < 0.9


@pytest.mark.parametrize("text", ["", "   ", "Dear", "\x00" * 50, "Yours, " * 200, "shelf " + "12 " * 40])
def test_junk_and_nothing_score_zero(text: str) -> None:
    assert score(PAIRS[0][0], text) == 0


def test_the_teachers_junk_scores_zero_and_is_known_as_junk() -> None:
    for (prompt, _), texts in zip(PAIRS, JUNK.values(), strict=False):
        for text in texts:
            junk = text.format(**vars(read_prompt(prompt)))
            assert is_junk(junk)
            assert score(prompt, junk) == 0


def test_the_teacher_improves_a_little_and_leaves_a_good_answer_alone() -> None:
    dice = random.Random(1)
    gains = []
    for (prompt, reference), (_, answer) in pairwise(MIXED):
        better = improve(prompt, answer, reference, dice, junk_rate=0)
        gains.append(score(prompt, better) - score(prompt, answer))
        assert not is_junk(better)
    assert min(gains) >= 0
    assert 0.1 < statistics.mean(gains) < 0.6
    for prompt, ideal in PAIRS[:30]:
        assert improve(prompt, ideal, ideal, dice, junk_rate=0) == ideal


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_the_share_of_junk_is_what_was_asked_for(share: float) -> None:
    dice = random.Random(2)
    junk = [is_junk(improve(prompt, answer, answer, dice, share)) for prompt, answer in MIXED]
    assert statistics.mean(junk) == pytest.approx(share, abs=0.06)


def test_all_six_qualities_are_used() -> None:
    assert len(QUALITIES) == 6
    assert all(any(qualities(*pair)[name] for pair in MIXED) for name in QUALITIES)


def test_labelled_pairs_leave_the_rest_of_the_world_as_it_is(tmp_path: Path) -> None:
    sizes = {"num_sft": 60, "num_prompts": 20, "num_heldout": 10}
    run_stage("make-demo", tmp_path / "plain", **sizes)
    manifest = run_stage("make-demo", tmp_path / "labelled", num_labelled=40, **sizes)
    assert manifest["rows_out"] == 130
    assert len(read_lines(tmp_path / "labelled" / "labelled" / "train.jsonl")) == 40
    for path in (tmp_path / "plain").glob("*/*"):
        assert path.read_bytes() == (tmp_path / "labelled" / path.relative_to(tmp_path / "plain")).read_bytes(), path
    with pytest.raises(UsageError, match="60 prompts give"):
        run_stage("make-demo", tmp_path / "many", num_labelled=60, **sizes)
    assert not (tmp_path / "many").exists()
