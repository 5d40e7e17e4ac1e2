"""The recipes for real models, with a tiny random model of the same architecture in their place."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, chat, read_lines, run, sentence, write_lines

from sgpo_cli import artifacts, pipeline, recipe

DEMO_WORLD = ("demo", "rivals", "ablations", "rounds", "rounds-retrained")
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in DEMO_WORLD)
LAUNCH = ROOT / "recipes" / "launch"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    steps = pipeline.plan(recipe.read(path))
    missing = [step for step in steps if step.state == pipeline.NEEDS]
    assert all("data/" in step.why for step in missing)  # what the recipe says one has to bring
    trained = [step for step in steps if step.config.TRAINER]
    assert len(trained) >= 2
    for step in trained:
        assert "expected" not in step.why
        if step.spec.launch:
            assert (ROOT / step.spec.launch.split()[1]).exists()


@pytest.mark.parametrize("name", DEMO_WORLD)
def test_a_recipe_of_the_demo_world_needs_nothing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    book = recipe.read(ROOT / "recipes" / f"{name}.yaml")
    assert all(step.state == pipeline.MISSING for step in pipeline.plan(book))


def test_the_rivals_of_the_demo_world_have_equal_budgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    book = recipe.read(ROOT / "recipes" / "rivals.yaml")
    own = ("model_name_or_path", "dataset", "output_dir", "learning_rate", "beta", "loss_type", "loss_weights")
    trained = [step for step in book.steps.values() if step.stage == "dpo"]
    budgets = [{key: value for key, value in step.options.items() if key not in own} for step in trained]
    assert len(budgets) == 9
    assert all(budget == budgets[0] and budget["max_rows"] == 1150 for budget in budgets)
    judged = {Path(model).name for model in book.steps["rival-scores"].options["models"]}
    assert judged == {"m0", *(step.name for step in trained)}


@pytest.mark.parametrize("name", ["fsdp2", "zero3", "ddp"])
def test_the_launch_files_are_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # refuses unknown keys
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"


def stub(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("gpus", "nodes", "wanted"),
    [
        (0, 1, "python -m sgpo_cli dpo"),
        (4, 1, "accelerate launch --config_file {}/fsdp2.yaml --num_processes 4 -m sgpo_cli dpo"),
        (
            8,
            3,
            "accelerate launch --config_file {}/fsdp2.yaml --num_machines 3 --machine_rank 2 --num_processes 24 "
            "--main_process_ip n1 --main_process_port 20017 -m sgpo_cli dpo",
        ),
    ],
)
def test_the_launcher_uses_what_there_is(tmp_path: Path, gpus: int, nodes: int, wanted: str) -> None:
    stub(tmp_path, "nvidia-smi", f"for n in $(seq {gpus}); do echo GPU; done")
    stub(tmp_path, "scontrol", "echo n1; echo n2")
    for program in ("accelerate", "python"):
        stub(tmp_path, program, f'echo {program} "$@"')
    stub(tmp_path, "srun", 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=2 exec "$@"')
    slurm = {"SLURM_NNODES": str(nodes), "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "train.sh", "fsdp2", "-m", "sgpo_cli", "dpo"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == wanted.format(LAUNCH)


# ---------------------------------------------------------------- runs


def tiny(directory: Path, base: Path, architecture: str) -> None:
    """A random model of an architecture, and a tokenizer: Llama 3's base has no template and other tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    if architecture == "Llama-3-8B":
        marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"bos_token": marks[0], "eos_token": marks[1], "pad_token": marks[1]})
        tokenizer.add_tokens(marks[2:], special_tokens=True)
        tokenizer.chat_template = None
    elif architecture == "Qwen2.5-7B":
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})  # the base model's, not its template's
    kinds = {"Qwen": (Qwen2Config, Qwen2ForCausalLM), "Llama": (LlamaConfig, LlamaForCausalLM)}
    config_class, model_class = kinds[architecture[:4] if architecture.startswith("Qwen") else "Llama"]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=128,  # 4-bit weights come in blocks of 64
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    model = model_class(config).bfloat16()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def shrink(path: Path, models: dict[str, str]) -> dict[str, Any]:
    """The recipe with small models, data of ours, and an engine and a teacher that need no GPU and no key."""
    book = yaml.safe_load(path.read_text())
    for step in book["steps"].values():
        for key in ("policy", "model_name_or_path"):
            step[key] = models.get(step.get(key), step.get(key)) if key in step else None
        for key in ("policy", "model_name_or_path"):
            if step[key] is None:
                del step[key]
        if not str(step.get("dataset", "./")).startswith("./"):
            step["dataset"] = (
                DATA.get(step.get("pairing"), "prompts.jsonl") if step["stage"] == "gen-pairs" else "sft.jsonl"
            )
        step |= {"scorer": "scorers:length"} if "scorer" in step else {}
        step |= {"global_batch_size": 8} if "global_batch_size" in step else {}
        step |= {"engine": "echo", "batch_size": 8} if step["stage"] in ("make-targets", "gen-pairs") else {}
        step |= {"teacher": "reference", "gates": ["none"]} if "teacher" in step else {}
        for key in ("price", "max_cost", "dataset_num_proc", "engine_options", "split"):
            step.pop(key, None)
        if step["stage"] == "gen-pairs":
            step["temperature"] = 1.0
    return book


DATA = {"spin": "sft.jsonl", "labelled": "labelled.jsonl"}  # other pairings read prompts alone
HUB = {
    "Qwen/Qwen2.5-7B": "Qwen2.5-7B",
    "Qwen/Qwen2.5-7B-Instruct": "Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen2.5-0.5B-Instruct",
    "meta-llama/Meta-Llama-3-8B": "Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B-Instruct": "Llama-3-70B-Instruct",
}


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_with_a_tiny_model_of_its_architecture(
    base: Path, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in HUB.values():
        if f"/{name}\n" in path.read_text() or f"Meta-{name}\n" in path.read_text():
            tiny(tmp_path / name, base, name)
    rows = [{"messages": [*chat(n), {"role": "assistant", "content": sentence(n + 2)}]} for n in range(16)]
    write_lines(tmp_path / "sft.jsonl", rows)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": sentence(n + 40)} for n in range(16)])
    sides = {"chosen": sentence, "rejected": lambda n: sentence(n + 1)}
    labelled = [{"prompt": sentence(n), **{side: say(n) for side, say in sides.items()}} for n in range(40, 56)]
    write_lines(tmp_path / "labelled.jsonl", labelled)
    (tmp_path / "scorers.py").write_text("def length(prompt, response): return sum(map(ord, response))\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / path.name).write_text(yaml.safe_dump(shrink(path, HUB), sort_keys=False))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [sys.executable, "-m", "sgpo_cli", "run", path.name]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr
    book = recipe.read(tmp_path / path.name)
    for step in book.steps.values():
        manifest = artifacts.read_manifest(tmp_path / step.options["output_dir"]) or {}
        if step.stage == "dpo":
            assert manifest["training"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
        if "rows_out" in manifest:
            assert manifest["rows_out"] > 0
    plan = run(tmp_path, "dpo", "--recipe", path.name, "--step", "m1", "--dry-run")
    assert "fits on 16 GB  <- this step" in plan.stdout, plan.stderr
    assert read_lines(tmp_path / book.run_dir / "pairs" / "train.jsonl")
