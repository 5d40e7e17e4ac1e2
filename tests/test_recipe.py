"""Recipes: what is read, and what is refused with file and key before anything runs."""

from pathlib import Path

import pytest
from conftest import ROOT

from sgpo_cli import recipe
from sgpo_cli.errors import UsageError

GOOD = """\
run_dir: runs/x
x-train: &train {learning_rate: 1e-4, warmup_steps: 0.1}
steps:
  world: {stage: make-demo}
  m0: {stage: sft, model_name_or_path: ./world/base, dataset: ./world/sft, <<: *train}
  pairs: {stage: gen-pairs, policy: ./m0, dataset: data/prompts.jsonl, temperature: 1, max_rows: 012}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_anchors_and_yaml_1_2_numbers(tmp_path: Path) -> None:
    steps = recipe.read(write(tmp_path, GOOD)).steps
    assert list(steps) == ["world", "m0", "pairs"]
    assert steps["m0"].options["model_name_or_path"] == "runs/x/world/base"
    assert steps["m0"].options["learning_rate"] == 1e-4
    assert steps["pairs"].options["dataset"] == "data/prompts.jsonl"
    assert steps["pairs"].options["max_rows"] == 12
    assert steps["pairs"].options["output_dir"] == "runs/x/pairs"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "learning_rat", r"steps.m0: unknown option 'learning_rat' \(did you mean 'learning_rate'"),
        ("1e-4", "fast", "steps.m0: option 'learning_rate': expected float, got 'fast'"),
        ("temperature: 1", "temprature: 1", r"unknown option 'temprature' \(did you mean 'temperature'"),
        ("temperature: 1", "temperature: hot", "option 'temperature'.*got 'hot'"),
        ("temperature: 1", "temperature: -1", "option 'temperature'.*greater than or equal to 0"),
        ("temperature: 1", "top_p: 1.5", "option 'top_p'.*less than or equal to 1"),
        ("max_rows: 012", "max_rows: 0", "option 'max_rows'.*greater than 0"),
        ("max_rows: 012", "max_rows: 1.5", "option 'max_rows'.*integer"),
        ("max_rows: 012", "on_bad_row: ignore", "'stop' or 'reject'"),
        ("max_rows: 012", "policy: z", r"recipe.yaml:6:\d+: duplicate key 'policy'"),
        ("stage: sft", "stage: sfft", "steps.m0.stage: unknown stage 'sfft'.*did you mean 'sft'"),
        ("stage: sft, ", "", "unknown stage None"),
        ("./world/base", "./wrold/base", r"m0.model_name_or_path: ./wrold/base is no earlier step.*'world'"),
        ("policy: ./m0", "policy: ./pairs", "pairs.policy: ./pairs is no earlier step"),
        ("policy: ./m0, ", "", "steps.pairs: option 'policy' is missing"),
        ("policy: ./m0", "policy: [./m0]", "option 'policy'.*string"),
        ("run_dir: runs/x", "rundir: runs/x", "unknown key 'rundir'.*did you mean 'run_dir'"),
        ("run_dir: runs/x", "run_dir: 5", "key 'run_dir': expected a path"),
        ("world: {", "../world: {", "a step's name begins with"),
        ("stage: make-demo", "stage: make-demo, num_sft: yes", "num_sft.*got 'yes'"),
        ("stage: make-demo", "stage: make-demo, output_dir: x", "world.output_dir: a step's directory is"),
        ("stage: make-demo", "stage: make-demo, num_sft: true", "num_sft.*got True"),
        ("stage: make-demo", "stage: make-demo, seed: -1", "seed.*greater than or equal to 0"),
        ("stage: make-demo", "stage: make-demo, launch: [a]", "launch: expected a command line"),
        ("stage: make-demo", "stage: make-demo, learning_rate: 1", "unknown option 'learning_rate'"),
        ("{stage: make-demo}", "[1, 2]", "steps.world: expected a map"),
        ("{stage: make-demo}", "{stage: make-demo", r"recipe.yaml:\d+:\d+: "),
        ("{stage: make-demo}", "!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("{stage: make-demo}", "&a {stage: make-demo, x: *a}", "more than 100000 values"),
        ("{stage: make-demo}", "[" * 60 + "]" * 60, "nested too deeply"),
        ("stage: make-demo", "stage: make-demo, ? [a, b] : 1", "recipe.yaml"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as refused:
        recipe.read(path)
    assert "recipe.yaml" in str(refused.value)


@pytest.mark.parametrize("text", ["", "steps", "- 1", "run_dir: x", "run_dir: x\nsteps: {}", "a: b: c", "\t- x"])
def test_what_is_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        recipe.read(write(tmp_path, text))


def test_an_anchor_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "x-0: &x0 [a]\n" + "".join(f"x-{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 12))
    with pytest.raises(UsageError, match="more than 100000 values"):
        recipe.read(write(tmp_path, bomb + GOOD))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.yaml: No such file"):
        recipe.read(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        recipe.read(tmp_path / "binary.yaml")


RECIPES = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "launch"]  # accelerate's


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: path.name)
def test_every_recipe_that_comes_along_is_right(path: Path) -> None:
    assert recipe.read(path).steps
