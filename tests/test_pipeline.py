"""The whole road on a small demo world: real training, real generation, every step its own process."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import read_lines, run

pytestmark = pytest.mark.model

SIZES = "num_sft: 160, num_prompts: 48, num_heldout: 24"
DATA_STEPS = ("world/sft", "world/prompts", "world/heldout", "targets", "filtered", "pairs", "scores")
STEPS = ("world", "m0", "targets", "filtered", "improver", "pairs", "m1", "scores")


def outputs(run_dir: Path, steps: tuple[str, ...] = STEPS) -> dict[str, str]:
    """The digests of everything that steps have made."""
    return {
        f"{step}/{name}": facts["sha256"]
        for step in steps
        for name, facts in json.loads((run_dir / step / "manifest.json").read_text())["outputs"].items()
        if name != "training_log.json"  # holds seconds
    }


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    """The finished run, to change it at will."""
    shutil.copytree(demo, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_step_keeps_its_books(demo: Path) -> None:
    for step in STEPS:
        facts = json.loads((demo / "runs/demo" / step / "manifest.json").read_text())
        assert facts["rows_in"] == facts["rows_out"] + sum(facts["rejected"].values()), step
        assert facts["seconds"] > 0
    assert json.loads((demo / "runs/demo/pairs/manifest.json").read_text())["generation_seconds"] > 0


def test_the_metrics_have_every_model_role_and_decoding(demo: Path) -> None:
    models = json.loads((demo / "runs/demo/scores/metrics.json").read_text())["models"]
    found = {(entry["name"], entry["role"], entry["decoding"]) for entry in models}
    roles = [(role, decoding) for role in ("policy", "improver") for decoding in ("sampled", "greedy")]
    assert found == {(name, *each) for name in ("m0", "improver", "m1") for each in roles}
    for entry in models:
        assert 0 <= entry["ci95"][0] <= entry["score"] <= entry["ci95"][1] <= 1
        assert entry["n"] == 24


@pytest.mark.parametrize("step", DATA_STEPS)
def test_datasets_reads_every_data_step(demo: Path, step: str) -> None:
    from datasets import load_dataset

    directory = demo / "runs/demo" / step
    rows = load_dataset(str(directory), split="train", cache_dir=str(demo / "cache"))
    assert rows["id"] == [row["id"] for row in read_lines(directory / "train.jsonl")]


def test_again_is_quick_and_changes_nothing(demo: Path) -> None:
    before = outputs(demo / "runs/demo")
    started = time.monotonic()
    result = run(demo, "run", "demo.yaml")
    assert time.monotonic() - started < 5
    assert result.returncode == 0
    assert all(f"{step}: up to date" in result.stderr for step in STEPS)
    assert outputs(demo / "runs/demo") == before


def test_a_deleted_step_and_what_is_built_on_it_run_again_to_the_same_bytes(copy: Path) -> None:
    before = outputs(copy / "runs/demo")
    shutil.rmtree(copy / "runs/demo/pairs")
    plan = run(copy, "run", "demo.yaml", "--dry-run").stdout
    assert "m1 " in plan
    assert "out of date" in plan
    result = run(copy, "run", "demo.yaml")
    assert result.returncode == 0, result.stderr
    ran = [line.split(":")[0] for line in result.stderr.splitlines() if ": runs (" in line]
    assert ran == ["pairs", "m1", "scores"]
    assert outputs(copy / "runs/demo") == before


def test_dpo_killed_at_random_moments_gives_the_same_weights(copy: Path) -> None:
    before = outputs(copy / "runs/demo", ("m1",))
    seconds = json.loads((copy / "runs/demo/m1/manifest.json").read_text())["seconds"]
    shutil.rmtree(copy / "runs/demo/m1")
    dice = random.Random(7)
    command = [sys.executable, "-m", "sgpo_cli", "dpo", "--recipe", "demo.yaml", "--step", "m1"]
    for _ in range(4):
        process = subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (copy / "runs/demo/m1/request.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(dice.uniform(0.0, 1.0) * seconds)
        process.kill()
        process.wait()
        if (copy / "runs/demo/m1/manifest.json").exists():
            break
    result = run(copy, "dpo", "--recipe", "demo.yaml", "--step", "m1")
    assert result.returncode == 0, result.stderr
    assert outputs(copy / "runs/demo", ("m1",)) == before


def test_trl_trains_on_our_pairs_as_they_are(demo: Path, tmp_path: Path) -> None:
    """`trl dpo` would start accelerate and this script; the script alone is what reads the data."""
    arguments = (
        f"--dataset_name {demo}/runs/demo/pairs --model_name_or_path {demo}/runs/demo/improver "
        f"--output_dir {tmp_path}/out --max_steps 1 --per_device_train_batch_size 4 --use_cpu"
    )
    result = subprocess.run(
        [sys.executable, "-m", "trl.scripts.dpo", *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_gen_pairs_takes_the_improver_prompt_from_the_improver(demo: Path, tmp_path: Path) -> None:
    trained = json.loads((demo / "runs/demo/improver/manifest.json").read_text())["improver_prompt"]
    for step in ("pairs", "m1"):
        assert json.loads((demo / "runs/demo" / step / "manifest.json").read_text())["improver_prompt"] == trained
    (tmp_path / "other.txt").write_text("Make it rhyme.")
    options = ["--improver-prompt", tmp_path / "other.txt", "--output-dir", tmp_path / "out"]
    result = run(demo, "gen-pairs", "--recipe", "demo.yaml", *options)
    assert result.returncode == 2
    assert "was trained with another improver prompt" in result.stderr


def test_a_failing_step_stops_the_run_with_its_message_and_how_to_continue(copy: Path) -> None:
    shutil.rmtree(copy / "runs/demo/m1")
    text = (copy / "demo.yaml").read_text().replace("stage: dpo", "stage: dpo, learning_rate: 1e30, logging_steps: 1")
    (copy / "demo.yaml").write_text(text)
    result = run(copy, "run", "demo.yaml")
    assert result.returncode == 8, result.stderr
    assert "error: step" in result.stderr
    assert "to continue: sgpo run demo.yaml" in result.stderr
    assert not (copy / "runs/demo/m1/manifest.json").exists()


def test_status_tells_what_is_done(demo: Path) -> None:
    shown = run(demo, "status", "demo.yaml").stdout
    assert shown.count("up to date") == len(STEPS)
