"""Memory and time of the data steps as the rows grow: nothing but a few numbers may stay for each row.

    python benchmarks/memory.py --rows 10000 100000 1000000

gen-pairs runs with the echo engine, filter-ppl with a real but minimal model (one layer of width 8), so that what
is measured is everything but the model: reading, tokenising, journals, writing, quality, digests. Each run is a
process of its own. Peak memory is that of the whole process; times are those of the clock and of the processor,
which says more on a busy machine. Writes `benchmarks/memory.json` after each run, and deletes what was made.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

from sgpo_cli.artifacts import read_manifest, write_lines

WORDS = "the small harbour keeps every lost umbrella and lantern safe until somebody asks for it".split()
STAGES = {
    "gen-pairs": ["--engine", "echo", "--max-length-ratio", 100],
    "filter-ppl": [],
}
Row = dict[str, Any]


def make_rows(count: int) -> Iterator[Row]:
    for number in range(count):
        words = [WORDS[(number * step) % len(WORDS)] for step in (1, 3, 5, 7, 11)]
        text = f"Row {number}: {' '.join(words)}."
        yield {"id": f"r{number}", "prompt": text, "response": text, "target": f"Of {number}: {words[number % 5]}."}


def build_model(directory: Path) -> None:
    """One layer of width 8 with the demo's kind of tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sgpo_cli.demo.model import build_base

    build_base(directory, [" ".join(WORDS)], seed=1)
    config = AutoConfig.from_pretrained(directory).to_dict()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8, "layer_types": None}
    config |= sizes | {"num_attention_heads": 1, "num_key_value_heads": 1}
    torch.manual_seed(1)
    shaped = AutoConfig.for_model(config.pop("model_type"), **config)
    AutoModelForCausalLM.from_config(shaped).save_pretrained(directory)


def measure(stage: str, rows: int, work: Path) -> dict[str, Any]:
    """One run of a stage as a process of its own."""
    data, output = work / "rows.jsonl", work / "out"
    write_lines(data, make_rows(rows))
    command = [sys.executable, "-m", "sgpo_cli", stage, "--policy", work / "model", "--dataset", data]
    command += [*STAGES[stage], "--output-dir", output]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = read_manifest(output) or {}
    shutil.rmtree(output)
    data.unlink()
    return {
        "rows": rows,
        "rows_out": facts["rows_out"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_mib": facts["peak_memory_mib"],
    }


def growth(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """From the smallest to the largest run: memory, and time for each further row beside that of the step before."""
    found: dict[str, Any] = {"further_memory_mib": runs[-1]["peak_memory_mib"] - runs[0]["peak_memory_mib"]}
    for kind in ("seconds", "processor_seconds"):
        pairs = itertools.pairwise(runs)
        found[f"{kind}_per_1000_further_rows"] = [
            round(1000 * (large[kind] - small[kind]) / (large["rows"] - small["rows"]), 4) for small, large in pairs
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path("runs/bench-memory"))
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build_model(arguments.build)
        return
    arguments.work.mkdir(parents=True)
    path = machine.HERE / "memory.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    try:
        # In another process: Linux counts the memory of the one that starts a process as that one's peak, too.
        subprocess.run([sys.executable, __file__, "--build", str(arguments.work / "model")], check=True)
        for stage in arguments.stages:
            runs = []
            for rows in sorted(arguments.rows):
                runs.append(measure(stage, rows, arguments.work))
                print(stage, runs[-1], flush=True)
                results[stage] = {"runs": runs, **growth(runs)}
                machine.write("memory", {"results": results})
    finally:
        shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
