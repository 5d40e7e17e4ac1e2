"""`sgpo compare`: intervals over seeds, costs by what a model was built from, and what happens when a seed fails."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Sgpo

from sgpo_cli import artifacts
from sgpo_cli.compare import figures, seeds, shown, student
from sgpo_cli.errors import IncompleteError, IntegrityError, UsageError

RECIPE = """\
run_dir: runs/rivals
steps:
  base:    {stage: sft, model_name_or_path: model, dataset: sft.jsonl}
  targets: {stage: make-targets, policy: ./base, dataset: sft.jsonl, teacher: demo}
  sgpo:    {stage: dpo, model_name_or_path: ./base, dataset: ./targets}
  scores:  {stage: evaluate, models: [./base, ./sgpo], dataset: prompts.jsonl, judge: demo}
"""
SCORES = {1: (0.4, 0.7), 2: (0.5, 0.9), 3: (0.6, 0.8)}


def finish(directory: Path, stage: str, inputs: dict[str, str], **facts: Any) -> str:
    """Write a step's request and manifest; returns its identity as an input."""
    directory.mkdir(parents=True, exist_ok=True)
    request = {"stage": stage, "version": 1, "config": facts.pop("config", {}), "inputs": inputs}
    outputs = {
        path.name: {"bytes": path.stat().st_size, "sha256": artifacts.sha256_file(path)}
        for path in directory.glob("metrics.json")
    }
    manifest = {
        **request,
        "seconds": 2.0,
        "finished": "2026-11-21T12:00:00Z",
        "run_id": hashlib.sha256(str(directory).encode()).hexdigest()[:16],
        "versions": {"trl": "1.16.0"},
        "outputs": outputs,
        **facts,
    }
    manifest["digest"] = artifacts.sha256_json(manifest)
    (directory / "request.json").write_text(json.dumps(request))
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return f"step:{artifacts.sha256_file(directory / 'manifest.json')}:."


def make_seed(directory: Path, scores: Sequence[float], teacher: str = "demo") -> None:
    """The steps of RECIPE as if they had been run; the second model costs more than the first."""
    base = finish(directory / "base", "sft", {}, rows_out=50, training={"steps": 10, "tokens": 1000})
    inputs = {"policy": base}
    targets = finish(
        directory / "targets", "make-targets", inputs, config={"teacher": teacher}, rows_in=40, completion_tokens=600
    )
    inputs = {"model_name_or_path": base, "dataset": targets}
    sgpo = finish(directory / "sgpo", "dpo", inputs, rows_out=30, training={"steps": 5, "tokens": 300})
    write_metrics(directory / "scores", {"base": scores[0], "sgpo": scores[1]})
    inputs = {"models.0": base, "models.1": sgpo}
    finish(directory / "scores", "evaluate", inputs, config={}, completion_tokens=99_999)


def write_metrics(directory: Path, scores: dict[str, float]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    entries = [
        {"name": name, "role": "policy", "decoding": "sampled", "score": score, "ci95": [score, score], "n": 40}
        for name, score in scores.items()
    ]
    (directory / "metrics.json").write_text(json.dumps({"models": entries}))


@pytest.fixture
def runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[seeds.SeedRun]:
    """Three seeds that are done."""
    monkeypatch.chdir(world)
    (world / "rivals.yaml").write_text(RECIPE)
    for seed, scores in SCORES.items():
        make_seed(world / f"runs/rivals/seed-{seed}", scores)
    return seeds.plan([Path("rivals.yaml")], None, [1, 2, 3])


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)]
)
def test_the_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert student.critical(freedom) == pytest.approx(value, abs=1e-6)


def test_an_interval_by_hand_and_none_for_one_seed() -> None:
    assert student.margin([0.4, 0.5, 0.6]) == pytest.approx(4.302653 * 0.1 / 3**0.5, abs=1e-6)
    assert student.margin([0.4]) is None


def test_scores_differences_and_costs(runs: list[seeds.SeedRun]) -> None:
    compared = figures.read(runs, "base")
    found = {method["name"]: method for method in shown.as_dict(compared)["methods"]}
    assert found["sgpo"]["scores"]["policy_sampled"]["mean"] == pytest.approx(0.8)
    assert found["sgpo"]["scores"]["policy_sampled"]["per_seed"] == {"1": 0.7, "2": 0.9, "3": 0.8}
    assert found["sgpo"]["differences"]["policy_sampled"]["per_seed"] == {"1": 0.3, "2": 0.4, "3": 0.2}
    assert found["base"]["differences"]["policy_sampled"] is None
    costs = {name: {key: value["mean"] for key, value in found[name]["cost"].items()} for name in found}
    nothing = dict.fromkeys(figures.COSTS, 0)
    assert costs["base"] == nothing | {"training_tokens": 1000, "seconds": 2}
    assert costs["sgpo"] == {
        "generated_tokens": 600,  # what evaluate generates is nobody's cost
        "teacher_calls": 40,
        "training_tokens": 1300,  # those of the model that it starts from count too
        "pairs": 30,
        "dpo_steps": 5,
        "seconds": 6,
    }


def test_differences_are_to_the_method_that_is_asked_for(runs: list[seeds.SeedRun]) -> None:
    assert figures.read(runs, None).against == "sgpo"
    assert seeds.evaluated(runs[0]) == ["base", "sgpo"]
    with pytest.raises(UsageError, match=r"--against sgpp.*did you mean"):
        figures.chosen("sgpp", seeds.evaluated(runs[0]))


def test_a_teacher_that_is_the_policy_itself_is_not_called(runs: list[seeds.SeedRun]) -> None:
    make_seed(runs[0].directory, (0.4, 0.5), teacher="self")
    sgpo = figures.read(runs, None).methods[1]
    assert [costs["teacher_calls"] for costs in sgpo.costs] == [0, 40, 40]


def test_a_seed_that_lacks_a_score_or_a_step_is_named(runs: list[seeds.SeedRun]) -> None:
    directory = runs[1].directory
    (directory / "scores" / "manifest.json").unlink()
    with pytest.raises(IncompleteError, match=r"seed-2/scores: this step has not finished"):
        figures.read(runs, None)
    write_metrics(directory / "scores", {"base": 0.5})
    finish(directory / "scores", "evaluate", {})
    with pytest.raises(IncompleteError, match=r"seed-2: sgpo: scored with some of the seeds only"):
        figures.read(runs, None)
    (directory / "scores" / "metrics.json").write_text("{}")
    with pytest.raises(IntegrityError):
        figures.read(runs, None)


def test_the_files_hold_every_figure_and_are_the_same_again(runs: list[seeds.SeedRun]) -> None:
    compared = figures.read(runs, None)
    paths = shown.write(compared, runs)
    before = [path.read_bytes() for path in paths]
    assert json.loads(before[0])["recipes"][0]["text"] == RECIPE
    svg = ElementTree.fromstring(before[1])
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert {"base", "sgpo", "policy sampled"} <= set(texts)
    shown.write(figures.read(runs, None), runs)
    assert [path.read_bytes() for path in paths] == before


def test_one_seed_has_no_interval(runs: list[seeds.SeedRun]) -> None:
    compared = figures.read(runs[:1], None)
    text = "\n".join(shown.lines(compared))
    assert "0.700" in text
    assert "±" not in text
    assert shown.chart(compared).count("<circle") == 3  # two marks and one of the legend


def test_seeds_are_a_number_or_a_list() -> None:
    assert seeds.parse("3") == [1, 2, 3]
    assert seeds.parse("1,2,7") == [1, 2, 7]
    assert seeds.parse("7,") == [7]
    for text in ("0", "", "x", "1,1", "-3", "1,-2", "99999999999"):
        with pytest.raises(UsageError):
            seeds.parse(text)


def test_recipes_that_do_not_fit_together_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    one, other = Path("one.yaml"), Path("other.yaml")
    one.write_text(RECIPE)
    other.write_text(RECIPE.replace("teacher: demo", "teacher: self"))
    with pytest.raises(UsageError, match=r"steps.targets is not the step of that name in one.yaml"):
        seeds.plan([one, other], None, [1])
    other.write_text(RECIPE.replace("runs/rivals", "runs/elsewhere"))
    with pytest.raises(UsageError, match="different run directories"):
        seeds.plan([one, other], None, [1])
    assert seeds.plan([one, other], Path("runs/both"), [4])[0].directory == Path("runs/both/seed-4")
    one.write_text(RECIPE.partition("  scores:")[0])
    with pytest.raises(UsageError, match="no recipe has an evaluate step"):
        seeds.plan([one], None, [1])


ECHO = """\
run_dir: runs/echo
steps:
  targets: {stage: make-targets, policy: model, dataset: sft.jsonl, teacher: reference, engine: echo}
  scores:
    {stage: evaluate, models: [model], dataset: prompts.jsonl, judge: "mine:half", engine: echo,
     answers: [policy_greedy]}
"""


@pytest.fixture
def echo(world: Path) -> Path:
    (world / "echo.yaml").write_text(ECHO)
    (world / "mine.py").write_text("def half(prompt, response):\n    return 0.5\n")
    return world


def test_the_command_runs_each_seed_once_and_continues(echo: Path, sgpo: Sgpo) -> None:
    result = sgpo("compare", "echo.yaml", "--seeds", "2", "--jobs", "2")
    assert result.returncode == 0, result.stderr
    for seed in (1, 2):
        assert f"seed {seed}: scores: runs (evaluate)" in result.stderr
        request = json.loads((echo / f"runs/echo/seed-{seed}/scores/request.json").read_text())
        assert request["config"]["seed"] == seed
    assert "policy greedy" in result.stdout
    assert (echo / "runs/echo/comparison.svg").exists()
    again = sgpo("compare", "echo.yaml", "--seeds", "2")
    assert "seed 2: scores: up to date" in again.stderr
    assert again.stdout == result.stdout


def test_a_failing_seed_is_named_when_the_others_are_done(echo: Path, sgpo: Sgpo) -> None:
    broken = echo / "runs/echo/seed-1/targets"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}")
    result = sgpo("compare", "echo.yaml", "--seeds", "2")
    assert result.returncode == 4
    assert "failed seeds: 1 (exit code 4)" in result.stderr
    assert "--seeds 2," in result.stderr
    assert (echo / "runs/echo/seed-2/scores/manifest.json").exists()
    assert not (echo / "runs/echo/comparison.json").exists()
