"""Several processes on one step: the same rows as one, also when some of them are lost."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Sgpo, read_lines, write_lines

from sgpo_cli import identity, recipe
from sgpo_cli.ranks import Rank
from sgpo_cli.step import Step

PAIRS = ("gen-pairs", "--policy", "model", "--dataset", "prompts.jsonl", "--engine", "echo", "--batch-size", "2")


def ranks(directory: Path, count: int, *arguments: object) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sgpo_cli", *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[int]:
    codes = []
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        codes.append(process.returncode)
    return codes


def rows(directory: Path) -> tuple[bytes, bytes]:
    return (directory / "train.jsonl").read_bytes(), (directory / "rejects.jsonl").read_bytes()


@pytest.mark.parametrize("count", [2, 3])
def test_they_give_what_one_gives(count: int, world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*PAIRS, "--output-dir", "one").returncode == 0
    assert ended(ranks(world, count, *PAIRS, "--output-dir", "several")) == [0] * count
    assert rows(world / "several") == rows(world / "one")
    assert not (world / "several" / "parts").exists()
    again = ranks(world, count, *PAIRS, "--output-dir", "several")
    assert ended(again) == [0] * count


def test_a_helper_that_comes_while_the_main_one_ends_leaves_no_log(
    world: Path, sgpo: Sgpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    assert sgpo(*PAIRS, "--output-dir", "out").returncode == 0
    values = dict(zip([flag[2:].replace("-", "_") for flag in PAIRS[1::2]], PAIRS[2::2], strict=True))
    config = recipe.build_config("gen-pairs", {**values, "batch_size": 2, "output_dir": "out"}, "test")
    helper = Step("out", identity.request_of("gen-pairs", config), rank=Rank(1, 2))
    (world / "out/manifest.json").rename(world / "manifest.json")
    with helper:
        helper.journal().append(1, {"rows": [], "stats": {}})
        (world / "manifest.json").rename(world / "out/manifest.json")
    assert not (world / "out/parts").exists()
    assert sgpo(*PAIRS, "--output-dir", "out").stdout == "out: up to date\n"


def test_a_lost_rank_is_made_up_for_and_another_number_continues(world: Path, sgpo: Sgpo) -> None:
    write_lines(world / "prompts.jsonl", [{"prompt": f"Tell me of thing number {n}."} for n in range(3000)])
    assert sgpo(*PAIRS, "--output-dir", "one").returncode == 0
    dice = random.Random(1)
    for number in (2, 3, 1):
        processes = ranks(world, number, *PAIRS, "--output-dir", "several")
        log = world / "several" / "parts" / "policy-0000.jsonl"
        end = time.monotonic() + 60
        while not log.exists() and time.monotonic() < end and not (world / "several" / "manifest.json").exists():
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.5))
        if number > 1:
            for process in processes if number == 3 else processes[1:]:
                process.kill()
        codes = ended(processes)
        if number != 3:
            assert codes[0] == 0
    assert rows(world / "several") == rows(world / "one")
    assert len(read_lines(world / "several" / "train.jsonl")) > 0


def test_torchrun_launches_them(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*PAIRS, "--output-dir", "one").returncode == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sgpo_cli",
    ]
    command = [*launcher, *PAIRS, "--output-dir", "several"]
    result = subprocess.run(command, cwd=world, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert rows(world / "several") == rows(world / "one")


@pytest.mark.parametrize(("rank", "count"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "two")])
def test_ranks_that_cannot_be_are_refused_at_once(world: Path, sgpo: Sgpo, rank: str, count: str) -> None:
    options = "gen-pairs --policy model --dataset prompts.jsonl --engine echo --output-dir out".split()
    result = sgpo(*options, RANK=rank, WORLD_SIZE=count)
    assert result.returncode == 2
    assert f"RANK is '{rank}' and WORLD_SIZE '{count}'" in result.stderr
    assert not (world / "out").exists()


def test_fresh_is_for_one_process(world: Path) -> None:
    processes = ranks(world, 2, *PAIRS, "--output-dir", "out", "--fresh")
    assert ended(processes) == [2, 2]
