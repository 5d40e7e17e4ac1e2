"""Rounds of a recipe, parts of a data set and several data sets."""

from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT, Sgpo, read_lines, run, write_lines

from sgpo_cli import identity, recipe
from sgpo_cli.dataset import read_dataset
from sgpo_cli.errors import UsageError
from sgpo_cli.options import DataConfig
from sgpo_cli.recipe import build_config
from sgpo_cli.rows import read_rows

RECIPE = """\
run_dir: runs/x
rounds: 3
steps:
  world: {stage: make-demo}
  m0: {stage: sft, model_name_or_path: ./world/base, dataset: ./world/sft}
  pairs-{round}: {stage: gen-pairs, policy: "./m{previous}", dataset: ./world/prompts, part: "{round}/{rounds}"}
  m{round}: {stage: dpo, model_name_or_path: "./m{previous}", dataset: ["./pairs-{previous}", "./pairs-{round}"]}
  scores: {stage: evaluate, models: [./m0, "./m{all}"], dataset: ./world/heldout}
"""


def steps_of(tmp_path: Path, text: str) -> dict[str, recipe.StepSpec]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return recipe.read(path).steps


def test_a_block_of_steps_is_repeated_in_its_order(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, RECIPE)
    assert list(steps) == ["world", "m0", "pairs-1", "m1", "pairs-2", "m2", "pairs-3", "m3", "scores"]
    assert steps["pairs-1"].options["policy"] == "runs/x/m0"
    assert steps["pairs-3"].options["policy"] == "runs/x/m2"
    assert [steps[f"pairs-{n}"].options["part"] for n in (1, 2, 3)] == ["1/3", "2/3", "3/3"]
    assert steps["m1"].options["dataset"] == ["runs/x/pairs-1"]  # the last two: there is no pairs-0
    assert steps["m3"].options["dataset"] == ["runs/x/pairs-2", "runs/x/pairs-3"]
    assert steps["scores"].options["models"] == [f"runs/x/m{n}" for n in range(4)]


def test_all_means_the_rounds_so_far(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, RECIPE.replace('["./pairs-{previous}", "./pairs-{round}"]', '["./pairs-{all}"]'))
    assert [len(steps[f"m{n}"].options["dataset"]) for n in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds: 3", "rounds: 0", "key 'rounds': expected a number from 1 to 100, got 0"),
        ("rounds: 3", "rounds: many", "key 'rounds': expected a number from 1 to 100, got 'many'"),
        ("rounds: 3", "rounds: true", "key 'rounds'.*got True"),
        ("rounds: 3\n", "", r"steps.pairs-\{round\}: how many rounds\?"),
        ("rounds: 3", "round: 3", "unknown key 'round'.*did you mean 'rounds'"),
        ("scores:", "m2:", "steps.m2: there is a step m2 already"),
        ("model_name_or_path: ./world/base", 'model_name_or_path: "./m{previous}"', r"steps.m0: ./m\{previous\}"),
        ('"{round}/{rounds}"', "4/3", r"steps.pairs-\{round\} \(round 1\): option 'part': expected one of several"),
        (
            'dataset: ["./pairs-{previous}"',
            'dataset: ["./pears-{previous}"',
            r"m\{round\} \(round 2\).dataset: ./pears-1",
        ),
        ('policy: "./m{previous}"', 'policy: "./m{all}"', r"pairs-\{round\} \(round 1\): ./m\{all\}: \{all\} belongs"),
        ('policy: "./m{previous}"', "policy: ./m0, temprature: 1", r"pairs-\{round\} \(round 1\): unknown option"),
    ],
)
def test_mistakes_name_the_recipes_own_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises(UsageError, match=message):
        steps_of(tmp_path, RECIPE.replace(old, new, 1))


def test_rounds_without_a_step_to_repeat(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="key 'rounds': no step is repeated"):
        steps_of(tmp_path, "run_dir: x\nrounds: 2\nsteps:\n  world: {stage: make-demo}\n")


def test_the_recipe_that_comes_along_has_four_guarded_rounds() -> None:
    steps = recipe.read(ROOT / "recipes" / "rounds.yaml").steps
    assert [name for name in steps if name.endswith("4")] == ["pairs-4", "check-pairs-4", "r4", "check-4"]
    prompts = {steps[f"pairs-{number}"].options["part"] for number in range(1, 5)}
    assert prompts == {"1/4", "2/4", "3/4", "4/4"}  # no two rounds see the same prompt


def config_of(**options: object) -> DataConfig:
    config = build_config("gen-pairs", {"output_dir": "out", "policy": "model", **options}, "test")
    assert isinstance(config, DataConfig)
    return config


def test_parts_are_disjoint_and_together_all(world: Path) -> None:
    source = str(world / "prompts.jsonl")
    parts = [[row["id"] for row in read_rows(source, ("prompt",), part=(n, 7))] for n in range(1, 8)]
    assert list(chain(*parts)) == [row["id"] for row in read_rows(source, ("prompt",))]
    assert {len(part) for part in parts} == {8, 9}
    first_two = read_rows(source, ("prompt",), part=(3, 7), max_rows=2)
    assert [row["id"] for row in first_two] == parts[2][:2]


def test_a_bad_row_outside_of_the_part_is_no_matter(world: Path) -> None:
    rows = read_lines(world / "prompts.jsonl")
    rows[40]["prompt"] = ""
    write_lines(world / "prompts.jsonl", rows)
    assert len(read_rows(str(world / "prompts.jsonl"), ("prompt",), part=(1, 2))) == 30
    with pytest.raises(UsageError, match=r"prompts\.jsonl:41"):
        read_rows(str(world / "prompts.jsonl"), ("prompt",), part=(2, 2))
    with pytest.raises(UsageError, match="60 rows make no 61 parts"):
        read_rows(str(world / "prompts.jsonl"), ("prompt",), part=(1, 61))


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "1/0", "-1/2", "1.5/2", "a/b", "", "1/2/3"])
def test_what_is_no_part(part: str) -> None:
    if part == "":
        assert config_of(dataset="x", part=None).part is None
        return
    with pytest.raises(UsageError, match="test: option 'part': expected one of several, such as 2/4"):
        config_of(dataset="x", part=part)


def test_several_data_sets_are_read_one_after_another(world: Path) -> None:
    source = str(world / "prompts.jsonl")
    alone = read_dataset(config_of(dataset=source), ("prompt",), str(world / "model"))
    both = read_dataset(config_of(dataset=[source, source], part="2/2"), ("prompt",), str(world / "model"))
    assert len(both) == 60
    assert [row["id"] for row in both] == [f"p{n}@{k}" for k in (1, 2) for n in range(30, 60)]
    assert [both[place] for place in range(60)] == list(both) == both[:]
    assert both[-1]["prompt"] == alone[-1]["prompt"]
    with pytest.raises(IndexError):
        both[60]
    with pytest.raises(UsageError, match="option 'dataset': names nothing"):
        config_of(dataset=[])


def test_one_data_set_in_a_list_is_the_same_request(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    plain = identity.request_of("gen-pairs", config_of(dataset="prompts.jsonl"))
    listed = identity.request_of("gen-pairs", config_of(dataset=["prompts.jsonl"]))
    assert plain == listed
    assert set(plain.inputs) == {"dataset", "policy"}
    several = identity.request_of("gen-pairs", config_of(dataset=["prompts.jsonl", "sft.jsonl"]))
    assert {"dataset.0", "dataset.1"} < set(several.inputs)


def test_a_step_from_before_these_options_is_up_to_date(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request on disk that has none of them is that of a step that does not use them."""
    monkeypatch.chdir(world)
    (world / "pairs.jsonl").write_bytes((world / "sft.jsonl").read_bytes())
    options = {"model_name_or_path": "model", "dataset": "pairs.jsonl"}
    for stage in ("dpo", "sft"):
        config = build_config(stage, {"output_dir": "out", **options}, "test")
        request = identity.request_of(stage, config)
        before = request.as_dict()
        before["config"] = {
            key: value
            for key, value in before["config"].items()
            if key not in ("part", "ref_model", "improver_replay")
        }
        assert request.changes(before) == []
        changed = build_config(stage, {"output_dir": "out", **options, "part": "1/2"}, "test")
        assert identity.request_of(stage, changed).changes(before) == ["part: None -> '1/2'"]


def test_on_the_command_line_the_flag_is_repeated(world: Path, sgpo: Sgpo) -> None:
    arguments = ["gen-pairs", "--policy", "model", "--engine", "echo", "--dataset", "prompts.jsonl"]
    result = sgpo(*arguments, "--dataset", "sft.jsonl", "--part", "1/6", "--output-dir", "out")
    assert result.returncode == 0, result.stderr
    ids = [row["id"] for name in ("train", "rejects") for row in read_lines(world / "out" / f"{name}.jsonl")]
    assert sorted(ids) == sorted(f"p{n}@{k}" for k in (1, 2) for n in range(10))


def test_status_and_a_single_step_know_the_rounds(world: Path) -> None:
    (world / "rounds.yaml").write_text(
        "run_dir: runs/r\nrounds: 2\nsteps:\n  pairs-{round}: {stage: gen-pairs, policy: model, engine: echo, "
        'dataset: prompts.jsonl, part: "{round}/{rounds}"}\n'
    )
    result = run(world, "gen-pairs", "--recipe", "rounds.yaml", "--step", "pairs-2")
    assert result.returncode == 0, result.stderr
    result = run(world, "status", "rounds.yaml")
    assert [line.split()[1] for line in result.stdout.splitlines() if "gen-pairs" in line] == ["pairs-1", "pairs-2"]
    assert "up to date" in result.stdout
    assert "to do" in result.stdout
