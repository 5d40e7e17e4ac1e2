"""filter-ppl on the demo's targets, with a share of junk that is known.

    python benchmarks/filter.py --runs runs/seeds --seeds 1 2 3

Takes M0 and the data of finished demo runs (`demo_seeds.py`), makes targets with 0, 10 and 30 % junk, filters
them with the defaults, and writes `benchmarks/filter.json`: shares of junk and of good targets dropped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine

from sgpo_cli.demo.teacher import is_junk


def sgpo(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "sgpo_cli", *map(str, arguments)], check=True)


def measure(run: Path, junk: float, rows: int) -> dict[str, Any]:
    """Make and filter targets with a share of junk; count what was dropped of each kind."""
    targets, filtered = run / f"targets-{junk}", run / f"filtered-{junk}"
    common = ["--policy", run / "m0", "--batch-size", 256]
    source = ["--dataset", run / "world" / "sft", "--max-rows", rows, "--max-new-tokens", 56]
    sgpo("make-targets", *common, *source, "--teacher", f"demo:{junk}", "--output-dir", targets)
    sgpo("filter-ppl", *common, "--dataset", targets, "--output-dir", filtered)
    kept, dropped = (
        [is_junk(row["target"]) for row in _rows(filtered / f"{name}.jsonl")] for name in ("train", "rejects")
    )
    all_junk, all_good = sum(kept) + sum(dropped), len(kept) + len(dropped) - sum(kept) - sum(dropped)
    return {
        "run": run.name,
        "junk_asked_for": junk,
        "junk": all_junk,
        "junk_dropped": sum(dropped),
        "junk_dropped_share": round(sum(dropped) / all_junk, 4) if all_junk else None,
        "good": all_good,
        "good_dropped": len(dropped) - sum(dropped),
        "good_dropped_share": round((len(dropped) - sum(dropped)) / all_good, 4),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    results = [
        measure(arguments.runs / f"seed-{seed}", junk, arguments.rows)
        for seed in arguments.seeds
        for junk in (0.0, 0.1, 0.3)
    ]
    lowest = min(result["junk_dropped_share"] for result in results if result["junk"])
    highest = max(result["good_dropped_share"] for result in results)
    machine.write("filter", {"lowest_junk_dropped": lowest, "highest_good_dropped": highest, "results": results})
    print(f"junk dropped: at least {lowest:.1%}; good targets dropped: at most {highest:.1%}")


if __name__ == "__main__":
    main()
