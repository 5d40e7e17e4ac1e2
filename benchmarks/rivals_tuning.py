"""The same choice of DPO settings for every method of `recipes/rivals.yaml`, on a seed that the comparison leaves out.

    python benchmarks/rivals_tuning.py --seed 3 --runs runs/seeds

The seed's run of the recipe is made if it is not there; each method's pairs and start model are then trained with
every setting below. Writes `benchmarks/rivals_tuning.json`: the policy's sampled and greedy score by method and
setting, on the recipe's held-out prompts. What is finished is not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine

RECIPE = Path(__file__).parents[1] / "recipes" / "rivals.yaml"
METHODS = ("dpo-labelled", "spin", "synpo", "distill", "sgpo")
# Loss, beta, learning rate. "sigmoid" is DPO as published, "sigmoid+sft" adds the likelihood of the chosen text.
SETTINGS = {
    "sigmoid 0.1 1e-4": (["sigmoid"], 0.1, 1e-4),
    "sigmoid 1.0 4e-4": (["sigmoid"], 1.0, 4e-4),
    "sigmoid 1.0 8e-4": (["sigmoid"], 1.0, 8e-4),
    "sigmoid+sft 1.0 4e-4": (["sigmoid", "sft"], 1.0, 4e-4),
    "sigmoid+sft 1.0 8e-4": (["sigmoid", "sft"], 1.0, 8e-4),
}


def sgpo(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "sgpo_cli", *map(str, arguments)], check=True)


def tune(method: str, seed: int, run: Path, work: Path) -> dict[str, Any]:
    """Scores by setting."""
    shared = ["--recipe", RECIPE, "--run-dir", run, "--seed", seed]
    models = {}
    for number, (name, (loss, beta, rate)) in enumerate(SETTINGS.items()):
        models[name] = work / f"{method}-{number}"
        flags = ["--loss-type", *loss, "--loss-weights", *([1] * len(loss)), "--beta", beta, "--learning-rate", rate]
        sgpo("dpo", *shared, "--step", method, "--output-dir", models[name], *flags)
    output = work / f"{method}-scores"
    named = [part for model in models.values() for part in ("--models", model)]
    sgpo("evaluate", *shared, "--step", "rival-scores", "--output-dir", output, *named)
    found: dict[str, dict[str, float]] = {name: {} for name in SETTINGS}
    for entry in json.loads((output / "metrics.json").read_text())["models"]:
        name = next(name for name, model in models.items() if model.name == entry["name"])
        found[name][entry["decoding"]] = entry["score"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args()
    run = arguments.runs / f"seed-{arguments.seed}"
    sgpo("run", RECIPE, "--run-dir", run, "--seed", arguments.seed)
    found = {}
    for method in METHODS:
        found[method] = tune(method, arguments.seed, run, arguments.runs / f"tuning-{arguments.seed}")
        machine.write("rivals_tuning", {"seed": arguments.seed, "scores": found})


if __name__ == "__main__":
    main()
