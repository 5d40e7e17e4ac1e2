"""gen-pairs with each pairing and several candidates; the echo engine answers, so no model is loaded."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_lines, run_stage, write_lines
from test_ranks import ended, ranks

from sgpo_cli import artifacts, recipe
from sgpo_cli.comparison import plain
from sgpo_cli.engines.echo import EchoEngine
from sgpo_cli.errors import UsageError

Pairs = Callable[..., tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]]
ROWS = 60


@pytest.fixture
def pairs(world: Path, monkeypatch: pytest.MonkeyPatch) -> Pairs:
    """Runs gen-pairs; returns manifest, pairs and rejects."""
    monkeypatch.chdir(world)
    for name in ("improver", "first"):
        (world / name).mkdir()
        for file in (world / "model").iterdir():
            (world / name / file.name).write_bytes(file.read_bytes())
    (world / "scorers.py").write_text(
        "def length(prompt, response): return len(response.split()[0].strip('0123456789'))\n"
        "def same(prompt, response): return 1\n"
        "def never(prompt, response): return None\n"
    )

    def make(name: str = "out", **options: Any) -> Any:
        output = world / name
        given = {"policy": "model", "dataset": "prompts.jsonl", "engine": "echo", "batch_size": 7, **options}
        manifest = run_stage("gen-pairs", output, max_length_ratio=9, **given)
        return manifest, read_lines(output / "train.jsonl"), read_lines(output / "rejects.jsonl")

    return make


def said(row: dict[str, Any], side: str) -> str:
    ((message),) = row[side]
    assert message["role"] == "assistant"
    return str(message["content"])


def answers(pairs: Pairs, **options: Any) -> list[str]:
    """What the policy answers to each prompt."""
    return [said(row, "rejected") for row in pairs("plain", **options)[1]]


def test_an_id_that_another_candidate_could_get_is_refused(pairs: Pairs, world: Path) -> None:
    write_lines(world / "prompts.jsonl", [{"id": name, "prompt": f"What of {name}?"} for name in ("a", "a#2")])
    assert len(pairs("one")[1]) == 2
    with pytest.raises(UsageError, match=r"'a#2' looks like that of another prompt's candidate"):
        pairs("two", num_candidates=2)
    assert not (world / "two").exists()


def test_a_prompt_with_several_candidates_is_no_near_copy_of_itself(pairs: Pairs) -> None:
    manifest, _, _ = pairs(num_candidates=3)
    assert manifest["quality"]["near_duplicates"]["prompt"] == 0


def test_several_candidates_are_several_pairs_with_ids_and_texts_of_their_own(pairs: Pairs) -> None:
    one, many = pairs("one"), pairs("many", num_candidates=3)
    manifest, rows, rejects = many
    assert (manifest["prompts"], manifest["rows_in"]) == (ROWS, 3 * ROWS)
    assert len(rows) + len(rejects) == 3 * ROWS
    assert [row["id"] for row in rows[:4]] == ["p0", "p0#2", "p0#3", "p1"]
    assert len({said(row, "rejected") for row in rows}) == 3 * ROWS
    assert [row for row in rows if "#" not in row["id"]] == one[1]  # the first is what it is alone


def test_an_improvement_can_be_improved_again(pairs: Pairs) -> None:
    once, twice = pairs("once")[1], pairs("twice", improvement_steps=2)[1]
    assert [said(row, "rejected") for row in once] == [said(row, "rejected") for row in twice]
    assert all(said(a, "chosen") != said(b, "chosen") for a, b in zip(once, twice, strict=True))


def test_spin_prefers_the_reference_to_the_policys_answer(pairs: Pairs) -> None:
    _, rows, _ = pairs(pairing="spin", dataset="sft.jsonl")
    assert [said(row, "chosen") for row in rows] == [f"Of p{n}: all is well." for n in range(ROWS)]
    assert [said(row, "rejected") for row in rows] == answers(pairs)


def test_distillation_prefers_the_target_to_the_response_and_loads_no_model(pairs: Pairs, world: Path) -> None:
    made = [{"id": f"t{n}", "prompt": f"Say {n}.", "response": f"No, not {n}.", "target": f"{n}!"} for n in range(8)]
    made[3]["target"] = made[3]["response"]
    write_lines(world / "targets.jsonl", [{**row, "reference": "Never mind."} for row in made])
    manifest, rows, rejects = pairs(pairing="distill", dataset="targets.jsonl")
    assert (said(rows[0], "chosen"), said(rows[0], "rejected")) == ("0!", "No, not 0.")
    assert [row["reason"] for row in rejects] == ["identical"]
    assert "generation_seconds" not in manifest


def test_synpo_prefers_another_models_improvement_to_the_first_models_answer(pairs: Pairs) -> None:
    _, sgpo, _ = pairs("plain")
    _, first_round, _ = pairs("first-round", pairing="synpo", improver="improver")
    assert [{**row, "id": ""} for row in first_round] == [{**row, "id": ""} for row in sgpo]  # M0 is the policy
    _, later, _ = pairs("later", pairing="synpo", improver="improver", initial="first")
    assert [said(row, "chosen") for row in later] == [said(row, "chosen") for row in sgpo]
    assert all(said(a, "rejected") != said(b, "rejected") for a, b in zip(later, sgpo, strict=True))


def test_one_model_is_in_memory_at_a_time(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[EchoEngine]] = []
    names: list[str] = []

    def load(engine: EchoEngine, model: str, **settings: Any) -> None:
        assert not any(other() for other in loaded)
        loaded.append(weakref.ref(engine))
        names.append(Path(model).name)

    monkeypatch.setattr(EchoEngine, "__init__", load)
    pairs("synpo", pairing="synpo", improver="improver", initial="first", improvement_steps=2)
    pairs("sgpo", improver="model")
    assert names == ["model", "improver", "first", "model"]


def test_several_processes_make_the_pairs_of_one(pairs: Pairs, world: Path) -> None:
    options = "--policy model --dataset prompts.jsonl --engine echo --batch-size 7 --max-length-ratio 9".split()
    options += "--pairing best-worst --num-candidates 4 --scorer scorers:length --output-dir shared".split()
    processes = ranks(world, 3, "gen-pairs", *options)
    assert ended(processes) == [0, 0, 0]
    _, rows, rejects = pairs("alone", pairing="best-worst", num_candidates=4, scorer="scorers:length")
    assert rows == read_lines(world / "shared" / "train.jsonl")
    assert rejects == read_lines(world / "shared" / "rejects.jsonl")


LABELLED = {
    "bare": ("Well.", "Ill."),
    "messages": ([{"role": "assistant", "content": "Well."}], [{"role": "assistant", "content": "Ill."}]),
    "whole conversations": tuple(
        [{"role": "user", "content": "How?"}, {"role": "assistant", "content": text}] for text in ("Well.", "Ill.")
    ),
}


@pytest.mark.parametrize("form", LABELLED)
def test_labelled_pairs_are_passed_through_and_checked(pairs: Pairs, world: Path, form: str) -> None:
    chosen, rejected = LABELLED[form]
    row = {"prompt": "How?", "chosen": chosen, "rejected": rejected}
    bad = [{**row, "rejected": chosen}]
    if form == "bare":
        bad.append({**row, "chosen": "Sure! Here's the improved answer: yes."})
        bad.append({**row, "chosen": "Well, well. " * 40})
    write_lines(world / "labelled.jsonl", [row, *bad])
    manifest, rows, rejects = pairs(pairing="labelled", dataset="labelled.jsonl")
    assert [(said(row, "chosen"), said(row, "rejected")) for row in rows] == [("Well.", "Ill.")]
    assert [row["reason"] for row in rejects] == ["identical", "meta_talk", "length_ratio"][: len(bad)]
    assert manifest["rows_in"] == 1 + len(bad)


def test_best_over_worst_keeps_all_candidates_with_their_scores(pairs: Pairs) -> None:
    manifest, rows, rejects = pairs(pairing="best-worst", num_candidates=4, scorer="scorers:length")
    assert manifest["rows_in"] == manifest["prompts"] == ROWS == len(rows) + len(rejects)
    assert {row["reason"] for row in rejects} <= {"tie"}
    for row in rows:
        scores = {each["text"]: each["score"] for each in row["candidates"]}
        assert len(scores) == 4
        assert scores[said(row, "chosen")] == max(scores.values()) > min(scores.values())
        assert scores[said(row, "rejected")] == min(scores.values())
    first = rows[0]["candidates"][0]
    assert (
        plain(rows[0]["candidates"]).splitlines()[0] == f"{first['score']}: {first['text']}"
    )  # as `sgpo inspect` does
    assert answers(pairs) == [row["candidates"][0]["text"] for row in sorted(rows + rejects, key=number)]


def number(row: dict[str, Any]) -> int:
    return int(row["id"][1:])


def test_ties_and_answers_without_a_score_make_no_pair(pairs: Pairs, world: Path) -> None:
    for scorer, reason in (("same", "tie"), ("never", "unscored")):
        with pytest.raises(Exception, match=f"no row is left .60 {reason}"):
            pairs(scorer, pairing="best-worst", num_candidates=2, scorer=f"scorers:{scorer}")
        assert len(read_lines(world / scorer / "rejects.jsonl")[0]["candidates"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "spo"}, "option 'pairing'"),
        ({"pairing": "best-worst", "num_candidates": 4}, "needs scorer"),
        ({"pairing": "best-worst", "scorer": "demo"}, "num_candidates of 2"),
        ({"scorer": "demo"}, "'scorer': pairing sgpo makes no use of it"),
        ({"pairing": "labelled", "num_candidates": 2}, "'num_candidates': pairing labelled"),
        ({"pairing": "spin", "improver": "model"}, "'improver': pairing spin"),
        ({"pairing": "spin", "improvement_steps": 2}, "'improvement_steps': pairing spin"),
        ({"initial": "model"}, "'initial': pairing sgpo"),
        ({"num_candidates": 2, "temperature": 0.0}, "all candidates are the same"),
        ({"num_candidates": 0}, "option 'num_candidates'"),
        ({"improvement_steps": 0}, "option 'improvement_steps'"),
    ],
)
def test_options_that_do_not_go_together_are_refused_with_the_recipe(options: dict[str, Any], message: str) -> None:
    given = {"policy": "model", "dataset": "d.jsonl", "output_dir": "out", **options}
    with pytest.raises(UsageError, match=message) as error:
        recipe.build_config("gen-pairs", given, "r.yaml: steps.pairs")
    assert str(error.value).startswith("r.yaml: steps.pairs: ")


def test_a_list_of_one_data_set_is_that_data_set() -> None:
    given = {"policy": "model", "dataset": ["d.jsonl"], "output_dir": "out"}
    assert recipe.build_config("gen-pairs", given, "test").dataset == "d.jsonl"  # type: ignore[attr-defined]


@pytest.mark.parametrize("scorer", ["openai:gpt", "hf:model", "rule", "no_such_module:score", "demo"])
def test_a_scorer_that_cannot_score_is_refused_before_any_text_is_made(pairs: Pairs, world: Path, scorer: str) -> None:
    with pytest.raises(UsageError):
        pairs(pairing="best-worst", num_candidates=2, scorer=scorer)
    assert artifacts.read_manifest(world / "out") is None
    assert not (world / "out").exists()
