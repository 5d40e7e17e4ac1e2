"""The stage contract, through the real command line with the echo engine."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Sgpo, read_lines, write_lines

TARGETS = "make-targets --policy model --dataset sft.jsonl --teacher reference --engine echo --output-dir out".split()


def manifest(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def test_every_row_comes_out_or_is_counted(world: Path, sgpo: Sgpo) -> None:
    result = sgpo(*TARGETS, "--max-new-tokens", 4)
    assert result.returncode == 3, result.stderr  # echo answers with eight words: every response is cut
    assert "60 cut_response" in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_in_are_rows_out_and_rejects(world: Path, sgpo: Sgpo) -> None:
    rows = read_lines(world / "sft.jsonl")
    rows[3]["completion"] = "bad <|im_end|> token"
    write_lines(world / "sft.jsonl", rows)
    tokenizer = {"added_tokens": [{"id": 0, "content": "<|im_end|>", "special": True}]}
    (world / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = sgpo(*TARGETS)
    assert refused.returncode == 2
    assert "sft.jsonl:4" in refused.stderr
    assert not (world / "out").exists()
    assert sgpo(*TARGETS, "--control-tokens", "keep").returncode == 0
    facts = manifest(world / "out")
    assert facts["rows_in"] == 60 == facts["rows_out"] + sum(facts["rejected"].values())
    assert [row["id"] for row in read_lines(world / "out" / "train.jsonl")] == [row["id"] for row in rows]


def test_rows_set_aside_by_the_reader_are_in_the_books(world: Path, sgpo: Sgpo) -> None:
    rows = read_lines(world / "sft.jsonl")
    rows[7]["prompt"] = "  "
    write_lines(world / "sft.jsonl", rows)
    result = sgpo(*TARGETS, "--on-bad-row", "reject", "--max-reject-share", "0.05")
    assert result.returncode == 0, result.stderr
    facts = manifest(world / "out")
    assert (facts["rows_in"], facts["rows_out"]) == (60, 59)
    (reject,) = read_lines(world / "out" / "rejects.jsonl")
    assert reject["where"].endswith("sft.jsonl:8")


def test_a_second_run_is_up_to_date_and_loads_nothing_heavy(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*TARGETS).returncode == 0
    before = (world / "out" / "manifest.json").read_bytes()
    started = time.monotonic()
    result = sgpo(*TARGETS, PYTHONPROFILEIMPORTTIME="1")
    assert time.monotonic() - started < 2
    assert "up to date" in result.stdout
    assert " torch" not in result.stderr
    assert (world / "out" / "manifest.json").read_bytes() == before


def test_another_request_is_refused_with_the_changed_keys(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*TARGETS).returncode == 0
    result = sgpo(*TARGETS, "--temperature", "0.5")
    assert result.returncode == 5
    assert "temperature: 1.0 -> 0.5" in result.stderr
    assert sgpo(*TARGETS, "--temperature", "0.5", "--fresh").returncode == 0
    assert (world / "out.old-1" / "manifest.json").exists()
    assert sgpo(*TARGETS, "--temperature", "0.6", "--fresh").returncode == 0
    assert (world / "out.old-2" / "manifest.json").exists()


def test_options_that_cannot_change_the_output_are_no_other_request(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*TARGETS).returncode == 0
    assert "up to date" in sgpo(*TARGETS, "--max-reject-share", "0.5").stdout


def test_changed_input_is_out_of_date(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*TARGETS).returncode == 0
    stat = (world / "sft.jsonl").stat()
    text = (world / "sft.jsonl").read_text().replace("well", "ill!")
    (world / "sft.jsonl").write_text(text)
    os.utime(world / "sft.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = sgpo(*TARGETS)
    assert result.returncode == 5
    assert "input dataset: changed" in result.stderr


@pytest.mark.parametrize("name", ["train.jsonl", "rejects.jsonl", "manifest.json"])
def test_a_changed_output_is_refused_by_its_step_and_by_the_next(world: Path, sgpo: Sgpo, name: str) -> None:
    rows = read_lines(world / "sft.jsonl")
    write_lines(world / "sft.jsonl", [*rows, {"id": "blank", "prompt": "?", "completion": "!"}])
    assert sgpo(*TARGETS).returncode == 0
    file = world / "out" / name
    content = file.read_bytes()
    file.write_bytes(content[:-2] if content else b"x")
    assert sgpo(*TARGETS).returncode == 4
    following = "gen-pairs --policy model --dataset out --engine echo --output-dir pairs".split()
    result = sgpo(*following)
    assert (result.returncode, (world / "pairs").exists()) == (4, False), result.stderr


@pytest.mark.parametrize("text", ["{}", "", "[1]"])
def test_a_manifest_that_is_not_ours_is_refused_and_fresh_repairs_it(echo_recipe: Path, sgpo: Sgpo, text: str) -> None:
    assert sgpo("run", "echo.yaml").returncode == 0
    (echo_recipe.parent / "runs/echo/targets/manifest.json").write_text(text)
    assert sgpo("run", "echo.yaml").returncode == 4
    shown = sgpo("status", "echo.yaml")
    assert (shown.returncode, "damaged" in shown.stdout) == (0, True)
    assert sgpo("run", "echo.yaml", "--fresh").returncode == 0
    assert "up to date" in sgpo("run", "echo.yaml").stderr


def test_counts_in_a_manifest_cannot_be_edited(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*TARGETS).returncode == 0
    path = world / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"rows_out": 60', '"rows_out": 61'))
    assert sgpo(*TARGETS).returncode == 4


def test_fresh_touches_nothing_before_the_new_request_is_good(world: Path, sgpo: Sgpo) -> None:
    assert sgpo(*TARGETS).returncode == 0
    assert sgpo(*TARGETS, "--fresh", "--engine", "vlm").returncode == 2
    (world / "bad.jsonl").write_text("{")
    assert sgpo(*TARGETS, "--fresh", "--dataset", "bad.jsonl").returncode == 2
    assert "up to date" in sgpo(*TARGETS).stdout


def test_the_plan_is_that_of_the_flags(echo_recipe: Path, sgpo: Sgpo) -> None:
    assert sgpo("run", echo_recipe).returncode == 0
    plain, again = (sgpo("run", echo_recipe, "--dry-run", *more).stdout for more in ((), ("--from", "pairs")))
    assert plain.count("up to date") == 2
    assert (again.count("up to date"), again.count("runs anew")) == (1, 1)
    assert sgpo("run", echo_recipe, "--dry-run", "--from", "pears").returncode == 2
    echo_recipe.write_text(echo_recipe.read_text().replace("prompts.jsonl,", "prompts.jsonl, max_rows: 9,"))
    assert "runs anew" in sgpo("run", echo_recipe, "--dry-run", "--fresh").stdout
    assert "to continue: sgpo run" in (shown := sgpo("status", echo_recipe).stdout)
    assert shown.rstrip().endswith("--fresh")


def test_fresh_moves_only_what_a_step_has_written(world: Path, sgpo: Sgpo) -> None:
    (world / "out").mkdir()
    (world / "out" / "thesis.txt").write_text("years of work")
    result = sgpo(*TARGETS, "--fresh")
    assert result.returncode == 2
    assert "thesis.txt" in result.stderr
    assert (world / "out" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("first/sub", "lies inside"),
        ("model/sub", "lies inside"),
        ("model", "which this step would write"),
        ("sft.jsonl", "sft.jsonl"),
        ("sft.jsonl/sub", "sft.jsonl"),
        ("n" * 300, "File name too long"),
        ("/proc/nowhere", "/proc/nowhere"),
    ],
)
def test_output_directories_that_cannot_be(world: Path, sgpo: Sgpo, output: str, message: str) -> None:
    assert sgpo(*TARGETS[:-1], "first").returncode == 0
    result = sgpo(*TARGETS[:-1], output)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_two_processes_on_one_directory(world: Path, sgpo: Sgpo) -> None:
    write_lines(world / "sft.jsonl", [{"prompt": f"thing {n}", "completion": "yes"} for n in range(30_000)])
    command = [sys.executable, "-m", "sgpo_cli", *TARGETS, "--batch-size", "4"]
    first = subprocess.Popen(command, cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(world / "out" / "parts" / "policy-0000.jsonl")
    started = time.monotonic()
    second = sgpo(*TARGETS, "--batch-size", "4")
    first.kill()
    first.wait()
    assert second.returncode == 11, second.stderr
    assert time.monotonic() - started < 5


def wait_for(path: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_polite_stop_keeps_the_work_and_says_so(world: Path, sgpo: Sgpo, stop: signal.Signals) -> None:
    write_lines(world / "sft.jsonl", [{"prompt": f"thing {n}", "completion": "yes"} for n in range(30_000)])
    command = [sys.executable, "-m", "sgpo_cli", *TARGETS, "--batch-size", "4"]
    process = subprocess.Popen(
        command,
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background (`make test &`) inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(world / "out" / "parts" / "policy-0000.jsonl")
    time.sleep(0.2)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + stop, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert sgpo(*TARGETS, "--batch-size", "4").returncode == 0
    assert manifest(world / "out")["rows_out"] == 30_000


@pytest.mark.parametrize("round_", range(2))
def test_killed_at_random_moments_it_ends_with_the_same_bytes(world: Path, sgpo: Sgpo, round_: int) -> None:
    """kill -9 of `sgpo run` across make-targets and gen-pairs, eight moments a round."""
    write_lines(world / "sft.jsonl", [{"prompt": f"thing {n}", "completion": "yes"} for n in range(8_000)])
    write_lines(world / "prompts.jsonl", [{"prompt": f"other thing {n}"} for n in range(8_000)])
    recipe = """\
run_dir: {0}
steps:
  targets:
    stage: make-targets
    policy: model
    dataset: sft.jsonl
    teacher: self
    gates: [none]
    engine: echo
    batch_size: 4
  pairs: {{stage: gen-pairs, policy: model, dataset: prompts.jsonl, engine: echo, batch_size: 4}}
"""
    for name in ("whole", "killed"):
        (world / f"{name}.yaml").write_text(recipe.format(name))
    started = time.monotonic()
    assert sgpo("run", "whole.yaml").returncode == 0
    length = time.monotonic() - started
    dice = random.Random(round_)
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-m", "sgpo_cli", "run", "killed.yaml"],
            cwd=world,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(dice.uniform(0.2, 0.8) * length)
        process.kill()
        process.wait()
        time.sleep(0.1)  # the step it ran dies with it, but not in the same instant
    result = sgpo("run", "killed.yaml")
    assert result.returncode == 0, result.stderr
    for step in ("targets", "pairs"):
        for file in ("train.jsonl", "rejects.jsonl"):
            assert (world / "killed" / step / file).read_bytes() == (world / "whole" / step / file).read_bytes()
        facts = manifest(world / "killed" / step)
        assert facts["rows_in"] == 8_000 == facts["rows_out"] + sum(facts["rejected"].values())


def test_disk_full_is_exit_7_and_nothing_is_lost(world: Path, sgpo: Sgpo) -> None:
    """A real file system of 1 MiB in a user namespace of its own."""
    write_lines(world / "sft.jsonl", [{"prompt": f"thing {n}", "completion": "yes " * 50} for n in range(8_000)])
    (world / "small").mkdir()
    command = f"{sys.executable} -m sgpo_cli {' '.join(TARGETS[:-1])} small/out"
    script = f"mount -t tmpfs -o size=1m tmpfs small && {command}; code=$?; cp -r small/out kept; exit $code"
    full = subprocess.run(["unshare", "-Urm", "sh", "-c", script], cwd=world, capture_output=True, text=True)
    if "unshare" in full.stderr:
        pytest.skip("this machine allows no user namespaces")
    assert full.returncode == 7, full.stderr
    assert "disk full" in full.stderr
    assert "Traceback" not in full.stderr
    (world / "kept").rename(world / "out")
    assert sgpo(*TARGETS).returncode == 0
    assert manifest(world / "out")["rows_out"] == 8_000
