"""Shared pieces: a run directory with echo steps (no model), and the command line as a real process."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sgpo_cli import artifacts, identity, recipe
from sgpo_cli.step import Step

ROOT = Path(__file__).parents[1]

Sgpo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sgpo(tmp_path: Path) -> Sgpo:
    """Runs `sgpo ...` as a process of its own in the test's directory."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sgpo_cli", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A directory with prompts, references and something that passes for a model where none is loaded."""
    prompts = [{"id": f"p{n}", "prompt": f"Tell me of thing number {n}, please."} for n in range(60)]
    write_lines(tmp_path / "prompts.jsonl", prompts)
    write_lines(tmp_path / "sft.jsonl", [{**row, "completion": f"Of {row['id']}: all is well."} for row in prompts])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sgpo_cli", *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo recipe with small sizes, run to its end; `runs/demo` lies in the directory.

    Made once, and copied for each process that runs tests: some of them break things.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo-made"
    with FileLock(made.with_suffix(".lock")):
        if not (made / "complete").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            (made / "demo.yaml").write_text((ROOT / "tests" / "small.yaml").read_text())
            result = run(made, "run", "demo.yaml")
            assert result.returncode == 0, result.stderr
            (made / "complete").touch()
    directory = base / "demo"
    shutil.copytree(made, directory)
    return directory


ECHO_RECIPE = """\
run_dir: runs/echo
steps:
  targets:
    {stage: make-targets, policy: model, dataset: sft.jsonl, teacher: reference, engine: echo, batch_size: 4}
  pairs: {stage: gen-pairs, policy: model, dataset: prompts.jsonl, engine: echo, batch_size: 4}
"""


@pytest.fixture
def echo_recipe(world: Path) -> Path:
    """A recipe of two steps that need no model."""
    path = world / "echo.yaml"
    path.write_text(ECHO_RECIPE)
    return path


# Stages with a tiny model of a standard architecture, in this process.

WORDS = "the small harbour keeps every lost umbrella and lantern safe until somebody asks for it".split()


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(3 + number % 9))


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(number)}]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sgpo_cli.demo.model import build_base

    directory = tmp_path_factory.mktemp("models") / "base"
    build_base(directory, [sentence(number) for number in range(50)], seed=1)
    return directory


def run_stage(stage: str, output: Path, **options: Any) -> dict[str, Any]:
    """One stage in this process; returns its manifest."""
    config = recipe.build_config(stage, {"output_dir": str(output), **options}, "test")
    step = Step(output, identity.request_of(stage, config))
    identity.check_inputs(config)
    importlib.import_module(f"sgpo_cli.stages.{stage.replace('-', '_')}").run(config, step)
    return artifacts.read_manifest(output) or {}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


SMALL = {"per_device_train_batch_size": 4, "max_length": 128, "num_train_epochs": 1, "bf16": False}
