"""The README's commands work as written, and its numbers are those of the committed benchmarks."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run

from sgpo_cli.configs import STAGES
from sgpo_cli.errors import SgpoError

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_make_knows_the_targets() -> None:
    targets = [shlex.split(command)[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["full-pipeline", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.model
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("sgpo ")])
def test_every_sgpo_command_works_beside_a_finished_demo(demo: Path, command: str) -> None:
    (demo / "data").mkdir(exist_ok=True)
    for name in ("sft", "prompts"):
        (demo / "data" / f"{name}.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n')
    arguments = [demo / "demo.yaml" if part == "recipes/demo.yaml" else part for part in shlex.split(command)[1:]]
    if not (demo / "recipes").exists():
        (demo / "recipes").symlink_to(ROOT / "recipes")
    result = run(demo, *arguments)
    assert result.returncode in (0, 3, 9), result.stderr  # a model of a few seconds may leave no good row or pair
    assert "Traceback" not in result.stderr


def test_every_stage_and_exit_code_is_in_the_readme() -> None:
    for stage in STAGES:
        assert stage in README
    for error in SgpoError.__subclasses__():
        assert re.search(rf"^\| {error.exit_code} \|", README, re.MULTILINE), error


def test_the_table_is_that_of_the_committed_benchmark() -> None:
    figures = json.loads((ROOT / "benchmarks" / "demo_seeds.json").read_text())
    scores = {(entry["name"], entry["role"], entry["decoding"]): entry for entry in figures["runs"][0]["scores"]}
    rows = re.findall(
        r"^\| (m0|improver|m1) \| (\w+) \| (\w+) \| ([0-9.]+) \| \[([0-9.]+), ([0-9.]+)\] \|", README, re.M
    )
    assert len(rows) == len(scores)
    for name, role, decoding, score, low, high in rows:
        entry = scores[name, role, decoding]
        assert (score, low, high) == tuple(f"{value:.3f}" for value in (entry["score"], *entry["ci95"]))
    for figure in figures["worst"].values():
        assert f"{figure:.3f}" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_names_a_path_of_one_machine() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace") if (ROOT / name).exists() else ""
        assert not re.search(r"(^|[\s\"'=])/(root|home|work)/", text), name
