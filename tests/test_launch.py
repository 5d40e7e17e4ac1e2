"""Training as real processes: several of them, killed, terminated, resumed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import chat, sentence, weights, write_lines

from sgpo_cli import launch
from sgpo_cli.errors import UsageError

pytestmark = pytest.mark.model

ONE = [sys.executable, "-m", "sgpo_cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sgpo_cli"]
COMMON = (
    "--max-length 256 --no-bf16 --learning-rate 1e-3 --global-batch-size 8 --per-device-train-batch-size 2 "
    "--logging-steps 1"
).split()


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A directory with data for every training stage, their number of rows no multiple of a batch."""
    (tmp_path / "base").symlink_to(base)
    write_lines(tmp_path / "sft.jsonl", [{"prompt": chat(n), "completion": sentence(n + 1)} for n in range(26)])
    improver = (
        {"response": sentence(n + 1), "reference": sentence(n + 2), "target": sentence(n + 3)} for n in range(21)
    )
    write_lines(tmp_path / "train-improver.jsonl", [{"prompt": chat(n), **row} for n, row in enumerate(improver)])
    pairs = ({"chosen": sentence(n + 1), "rejected": sentence(n + 3)} for n in range(26))
    write_lines(tmp_path / "dpo.jsonl", [{"prompt": chat(n), **row} for n, row in enumerate(pairs)])
    return tmp_path


def arguments(stage: str, output: str, *more: object) -> list[str]:
    inputs = ["--model-name-or-path", "base", "--dataset", f"{stage}.jsonl", "--output-dir", output]
    return [stage, *inputs, *COMMON, *map(str, more)]


def start(launcher: list[str], command: list[str], place: Path) -> subprocess.Popen[str]:
    with (place / "log").open("w") as log:
        return subprocess.Popen([*launcher, *command], cwd=place, stdout=log, stderr=log, text=True)


def finish(launcher: list[str], command: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*launcher, *command], cwd=place, capture_output=True, text=True, timeout=240)


def until(found: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait for something that the process does."""
    deadline = time.monotonic() + 240
    while not found():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def largest_difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "train-improver", "dpo"])
def test_two_processes_give_the_weights_of_one(place: Path, stage: str) -> None:
    options = ["--num-train-epochs", 2, *(["--precompute-ref-log-probs"] if stage == "dpo" else [])]
    accelerate = [sys.executable, *launch._launcher(2)[1:], "-m", "sgpo_cli"]
    for name, launcher in {"one": ONE, "torchrun": TORCHRUN, "accelerate": accelerate}.items():
        result = finish(launcher, arguments(stage, name, *options), place)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("rows,") == 1  # one process speaks and writes
    assert largest_difference(place / "one", place / "base") > 1e-3
    assert largest_difference(place / "one", place / "torchrun") < 1e-5
    assert weights(place / "torchrun") == weights(place / "accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE, TORCHRUN], ids=["one", "two"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_and_resumed_gives_the_same_bytes(place: Path, stage: str, launcher: list[str]) -> None:
    options = ["--num-train-epochs", 12, "--save-steps", 5]
    assert finish(launcher, arguments(stage, "whole", *options), place).returncode == 0
    command = arguments(stage, "killed", *options)
    process = start(launcher, command, place)
    until(lambda: (place / "killed" / "checkpoint-10" / "sgpo_seal.json").exists(), process)
    victims = children(process.pid) or [process.pid]
    os.kill(victims[-1], signal.SIGKILL)  # of two ranks, one; the launcher must take the other one down
    assert process.wait(timeout=60) != 0
    for victim in victims:
        assert not Path(f"/proc/{victim}").exists()
    assert not (place / "killed" / "manifest.json").exists()
    again = finish(launcher, command, place)
    assert again.returncode == 0, again.stderr
    assert "continues at step" in again.stderr
    assert weights(place / "killed") == weights(place / "whole")


def children(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in listed]


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_leaves_with_143(place: Path) -> None:
    options = ["--num-train-epochs", 12]
    assert finish(ONE, arguments("sft", "whole", *options), place).returncode == 0
    command = arguments("sft", "stopped", *options)
    process = start(ONE, command, place)
    until(lambda: "trains for" in (place / "log").read_text(), process)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(timeout=30) == 143
    (checkpoint,) = (place / "stopped").glob("checkpoint-*")
    assert (checkpoint / "sgpo_seal.json").exists()
    assert 0 < int(checkpoint.name.rpartition("-")[2]) < 48
    again = finish(ONE, command, place)
    assert again.returncode == 0, again.stderr
    assert "continues at step" in again.stderr
    assert weights(place / "stopped") == weights(place / "whole")


@pytest.mark.slow
def test_another_number_of_processes_is_refused(place: Path) -> None:
    command = arguments("sft", "out", "--num-train-epochs", 12, "--save-steps", 5)
    process = start(ONE, command, place)
    until(lambda: (place / "out" / "checkpoint-5" / "sgpo_seal.json").exists(), process)
    process.kill()
    process.wait()
    two = finish(TORCHRUN, command, place)
    assert two.returncode != 0
    assert "was made by 1 processes, these are 2" in two.stderr
    assert finish(ONE, command, place).returncode == 0
    up_to_date = finish(TORCHRUN, command, place)
    assert up_to_date.returncode == 0
    assert "up to date" in up_to_date.stdout


@pytest.fixture
def launched(place: Path) -> list[str]:
    """`sgpo run` of a recipe whose one step trains in two processes."""
    step = {"stage": "sft", "model_name_or_path": "base", "dataset": "sft.jsonl", "launch": shlex.join(TORCHRUN[:-2])}
    step |= {"max_length": 256, "bf16": False, "num_train_epochs": 40, "per_device_train_batch_size": 2}
    (place / "recipe.yaml").write_text(json.dumps({"run_dir": "runs", "steps": {"m0": step | {"logging_steps": 1}}}))
    return ["run", "recipe.yaml"]


@pytest.mark.slow
def test_a_lost_process_is_named_and_ends_all_with_exit_code_7(place: Path, launched: list[str]) -> None:
    process = start(ONE, launched, place)
    until(lambda: "trains for" in (place / "log").read_text(), process)
    (launcher,) = children(process.pid)
    ranks = children(launcher)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=60) == 7
    for pid in (launcher, *ranks):
        assert not Path(f"/proc/{pid}").exists()
    log = (place / "log").read_text()
    assert "of 2 processes, these were lost (killed or crashed): 1" in log
    assert "failed with exit code 7; to continue: sgpo run recipe.yaml" in log
    assert not (place / "runs" / "m0" / "manifest.json").exists()
    assert not list((place / "runs").glob(".ranks*"))


@pytest.mark.slow
def test_a_launched_step_that_diverges_ends_with_its_own_exit_code(place: Path, launched: list[str]) -> None:
    recipe = json.loads((place / "recipe.yaml").read_text())
    recipe["steps"]["m0"]["learning_rate"] = 1e30
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    result = finish(ONE, launched, place)
    assert result.returncode == 8, result.stderr
    assert not (place / "runs" / "m0" / "model.safetensors").exists()


class _Args:
    """What `launch` looks at."""

    def __init__(self, world_size: int = 1, fsdp: bool = False) -> None:
        self.world_size, self.fsdp, self.deepspeed_plugin = world_size, fsdp, None


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="started 2 processes, but each takes itself for one of 1"):
        launch.refuse_bad_states(_Args(), "full")  # type: ignore[arg-type]


def test_quantised_weights_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be sharded"):
        launch.refuse_bad_states(_Args(fsdp=True), "qlora")  # type: ignore[arg-type]
    launch.refuse_bad_states(_Args(fsdp=True), "lora")  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="cannot be sharded"):
        launch.refuse_bad_states(_Args(), "qlora")  # type: ignore[arg-type]


def test_a_global_batch_is_divided_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.accumulation_steps(128, 4) == 32
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch.accumulation_steps(128, 4) == 4
    with pytest.raises(UsageError, match="128 is no multiple of 24"):
        launch.accumulation_steps(128, 3)


def test_several_gpus_get_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    started: list[list[str]] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch.children, "run", lambda command, exits: started.append(command) or 7)
    monkeypatch.setattr(launch, "_end_with_launcher", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sgpo", "dpo", "--recipe", "x.yaml"])
    with pytest.raises(SystemExit, match="7"):
        launch.use_all_gpus()
    (command,) = started
    assert command[command.index("--num_processes") + 1] == "4"
    assert command[-5:] == ["-m", "sgpo_cli", "dpo", "--recipe", "x.yaml"]
    monkeypatch.setenv("WORLD_SIZE", "4")  # the processes that were started do not start again
    launch.use_all_gpus()
    assert len(started) == 1


def test_an_epoch_has_every_row_in_whole_batches() -> None:
    from sgpo_cli.row_order import SeededOrder

    for strategy in ("random", "sequential", "group_by_length"):
        first, again, later = (
            list(SeededOrder([5, 3, 9, 9, 1, 2, 7], 4, strategy, 1, lambda epoch=epoch: epoch)) for epoch in (0, 0, 1)
        )
        assert first == again
        assert len(first) == 8
        assert set(first) == set(range(7))
        assert (later == first) == (strategy == "sequential")
        assert len(list(SeededOrder([5, 3, 9], 4, strategy, 1, lambda: 0, whole=False))) == 3
