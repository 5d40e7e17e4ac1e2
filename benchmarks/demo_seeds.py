"""The demo recipe with several seeds, each from an untrained model to its scores.

    python benchmarks/demo_seeds.py --seeds 1 2 3 4 5 --runs runs/seeds

Writes `benchmarks/demo_seeds.json`: per seed the scores that the README promises, whether each promise was
kept, and the seconds of each step. A finished run is not made again, so runs made beforehand count too.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
Scores = dict[tuple[str, str, str], dict[str, Any]]


def run_seed(seed: int, runs: Path) -> dict[str, Any]:
    """One whole run; scores, promises, seconds per step."""
    directory = runs / f"seed-{seed}"
    command = [sys.executable, "-m", "sgpo_cli", "run", RECIPE, "--run-dir", directory, "--seed", str(seed)]
    subprocess.run(list(map(str, command)), check=True)
    manifests = {path.parent.name: json.loads(path.read_text()) for path in directory.glob("*/manifest.json")}
    seconds = {name: facts["seconds"] for name, facts in manifests.items() if ".old-" not in name}
    entries = json.loads((directory / "scores" / "metrics.json").read_text())["models"]
    scores = {(entry["name"], entry["role"], entry["decoding"]): entry for entry in entries}
    return {
        "seed": seed,
        "step_seconds": seconds,
        "seconds": round(sum(seconds.values()), 1),
        "promises": promises(scores),
        "scores": entries,
    }


def promises(scores: Scores) -> dict[str, dict[str, Any]]:
    """What the README promises, with the figure and whether it was kept."""
    m0, m1 = scores["m0", "policy", "sampled"], scores["m1", "policy", "sampled"]
    greedy = scores["m1", "policy", "greedy"]
    policy, improver = scores["improver", "policy", "sampled"], scores["improver", "improver", "sampled"]
    gain, gap = m1["score"] - m0["score"], improver["score"] - policy["score"]
    return {
        "M0 sampled in 0.3..0.6": {"figure": m0["score"], "kept": 0.3 <= m0["score"] <= 0.6},
        "M1 sampled at least 0.40 above M0": {"figure": round(gain, 4), "kept": gain >= 0.4 and _apart(m0, m1)},
        "M1 greedy at least 0.97": {"figure": greedy["score"], "kept": greedy["score"] >= 0.97},
        "improver at least 0.2 above policy in M*": {
            "figure": round(gap, 4),
            "kept": gap >= 0.2 and _apart(policy, improver),
        },
    }


def _apart(low: dict[str, Any], high: dict[str, Any]) -> bool:
    return bool(low["ci95"][1] < high["ci95"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args()
    results = [run_seed(seed, arguments.runs) for seed in arguments.seeds]
    names = list(results[0]["promises"])
    worst = {name: min(result["promises"][name]["figure"] for result in results) for name in names}
    kept = {name: sum(result["promises"][name]["kept"] for result in results) for name in names}
    machine.write("demo_seeds", {"seeds": len(results), "kept": kept, "worst": worst, "runs": results})
    for name in names:
        print(f"{name}: kept by {kept[name]} of {len(results)} seeds, lowest {worst[name]:.3f}")


if __name__ == "__main__":
    main()
