"""`sgpo dpo` against `trl dpo`, and `sgpo train-improver` against `trl sft`: wall time and what was learned.

    python benchmarks/training.py --repeats 3 --work runs/bench-training

The same rows, start model and settings, each run a process of its own, in turn; the median counts, import time
included. Each repeat has another seed, the same for all three, and losses are means over them: one order of rows
alone moves them by a percent or two. Seconds of the processor stand beside those of the clock: they hold on a
machine with other work too. All get one thread, which `trl`'s launcher gives itself anyway.
"plain" is sgpo with every setting as TRL has it, "defaults" sgpo as it comes. The evaluation loss is that of the
trained models on held-out rows, computed in one place for all. Writes `benchmarks/training.json`.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

from sgpo_cli import recipe
from sgpo_cli.artifacts import write_lines
from sgpo_cli.demo import world
from sgpo_cli.stages import train_improver

COMMON = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "max_length": 512,
    "lr_scheduler_type": "cosine",
    "bf16": False,
    "save_strategy": "no",
    "use_cpu": True,
}
STAGES = {
    "dpo": COMMON | {"learning_rate": 2e-5, "beta": 0.1},
    "train-improver": COMMON | {"learning_rate": 1e-3},
}
LIKE_TRL = {"activation_checkpointing": True, "train_sampling_strategy": "random", "precompute_ref_log_probs": False}
RUNS = ("trl", "plain", "defaults")
HELD_OUT = 64
Row = dict[str, Any]


def build_model(directory: Path, texts: list[str]) -> None:
    """Three million random parameters: large enough that training, not starting, takes the time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sgpo_cli.demo.model import build_base

    build_base(directory, texts, seed=1)
    config = AutoConfig.from_pretrained(directory)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 256, 768, 4, 64
    config.layer_types = None
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(type(config)(**config.to_dict())).save_pretrained(directory)


def make_rows(size: int) -> list[Row]:
    """Rows for both stages: the demo world's letters, a mixed answer and an ideal one."""
    import random

    rng = random.Random(1)
    rows = []
    for number in range(size):
        facts = world.draw_facts(rng)
        mixed, ideal = world.mixed_answer(facts, rng), world.ideal_answer(facts, rng)
        prompt = [{"role": "user", "content": world.write_prompt(facts, rng)}]
        pair = {"chosen": ideal, "rejected": mixed} if ideal != mixed else {"chosen": ideal, "rejected": "No."}
        rows.append(
            {"id": str(number), "prompt": prompt, "response": mixed, "reference": ideal, "target": ideal} | pair
        )
    return rows


def prepare(work: Path, size: int) -> None:
    """Model, `dpo.jsonl` and `train-improver.jsonl` for sgpo, and directories with the very same rows for TRL."""
    rows = make_rows(size)
    work.mkdir(parents=True, exist_ok=True)
    build_model(
        work / "model", [turn["content"] for row in rows for turn in row["prompt"]] + [row["target"] for row in rows]
    )
    for stage in STAGES:
        write_lines(work / f"{stage}.jsonl", rows)
    options = {"model_name_or_path": str(work / "model"), "dataset": str(work / "train-improver.jsonl")}
    config = recipe.build_config("train-improver", options | {"output_dir": str(work / "x")}, "benchmark")
    examples, _, _ = train_improver.examples(config)  # type: ignore[arg-type]
    pairs = [{"prompt": row["prompt"]} | {name: _turn(row[name]) for name in ("chosen", "rejected")} for row in rows]
    for name, part in {"dpo": pairs, "train-improver": examples}.items():
        (work / f"trl-{name}").mkdir(exist_ok=True)
        write_lines(work / f"trl-{name}" / "train.jsonl", part)


def _turn(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def flags(options: dict[str, Any]) -> list[str]:
    """As both command lines take them."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def command(who: str, stage: str, work: Path, output: Path, seed: int) -> list[str]:
    options = STAGES[stage] | {"seed": seed, "model_name_or_path": work / "model", "output_dir": output}
    if who == "trl":
        script = {"dpo": "dpo", "train-improver": "sft"}[stage]
        trl = Path(sys.executable).with_name("trl")
        return [str(trl), script, *flags(options | {"dataset_name": work / f"trl-{stage}"})]
    more = LIKE_TRL if who == "plain" else {}
    if stage == "train-improver":
        more = {name: value for name, value in more.items() if name != "precompute_ref_log_probs"}
    options |= {"dataset": work / f"{stage}.jsonl"} | more
    ours = [part.replace("_", "-") if part.startswith("--") else part for part in flags(options)]
    return [sys.executable, "-m", "sgpo_cli", stage, *ours]


def evaluation_loss(stage: str, model: Path, start: Path, rows: list[Row]) -> float:
    """On rows that no run has seen: the DPO loss against the start model, or the loss per token of the target."""
    from sgpo_cli.scoring import Scorer

    prompts = [row["prompt"] for row in rows]
    trained = Scorer(str(model))
    if stage == "train-improver":
        scores = trained.score(prompts, [row["target"] for row in rows])
        return -sum(score.log_prob for score in scores) / sum(score.tokens for score in scores)
    reference = Scorer(str(start))
    sums = {
        (name, side): [score.log_prob for score in scorer.score(prompts, [row[side] for row in rows])]
        for name, scorer in (("policy", trained), ("reference", reference))
        for side in ("chosen", "rejected")
    }
    margins = [
        STAGES["dpo"]["beta"] * (sums["policy", "chosen"][n] - sums["reference", "chosen"][n])
        - STAGES["dpo"]["beta"] * (sums["policy", "rejected"][n] - sums["reference", "rejected"][n])
        for n in range(len(rows))
    ]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(who: str, stage: str, work: Path, number: int) -> tuple[float, float, Path]:
    """Seconds of the clock and of the processor that one run took, and where its model lies."""
    output = work / f"{stage}-{who}-{number}"
    log = output.with_suffix(".log")
    started, before = time.perf_counter(), cpu_seconds()
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # nobody waits for a network
    quiet["OMP_NUM_THREADS"] = "1"
    with log.open("w") as file:
        code = subprocess.run(
            command(who, stage, work, output, number + 1), stdout=file, stderr=file, env=quiet
        ).returncode
    seconds = time.perf_counter() - started
    if code:
        raise SystemExit(f"{who} {stage} failed, see {log}")
    return seconds, cpu_seconds() - before, output


def compared(taken: dict[str, list[float]]) -> dict[str, Any]:
    """All figures, medians, and the two ratios that are promised."""
    middle = {who: statistics.median(each) for who, each in taken.items()}
    return {
        "all": taken,
        "median": middle,
        "plain_over_trl": round(middle["plain"] / middle["trl"], 3),
        "trl_over_defaults": round(middle["trl"] / middle["defaults"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path("runs/bench-training"))
    arguments = parser.parse_args()
    work = arguments.work
    prepare(work, arguments.rows)
    held_out = make_rows(arguments.rows + HELD_OUT)[-HELD_OUT:]
    before = machine.HERE / "training.json"
    results: dict[str, Any] = json.loads(before.read_text())["stages"] if before.exists() else {}
    for stage in arguments.stages:
        clock: dict[str, list[float]] = {who: [] for who in RUNS}
        processor: dict[str, list[float]] = {who: [] for who in RUNS}
        losses: dict[str, list[float]] = {who: [] for who in RUNS}
        for number in range(arguments.repeats):
            for who in RUNS:
                seconds, used, model = run(who, stage, work, number)
                clock[who].append(round(seconds, 1))
                processor[who].append(round(used, 1))
                losses[who].append(round(evaluation_loss(stage, model, work / "model", held_out), 5))
                print(
                    f"{stage} {who}: {seconds:.1f} s, {used:.1f} s of the processor, loss {losses[who][-1]:.4f}",
                    flush=True,
                )
        results[stage] = {
            "seconds": compared(clock),
            "processor_seconds": compared(processor),
            "evaluation_loss": {who: statistics.mean(each) for who, each in losses.items()},
            "evaluation_losses": losses,
        }
    settings = {stage: {name: str(value) for name, value in options.items()} for stage, options in STAGES.items()}
    machine.write("training", {"rows": arguments.rows, "settings": settings, "stages": results})


if __name__ == "__main__":
    main()
