"""Does the demo's metrics.json show what the README promises?

usage: python .ci/check_demo.py runs/demo/scores/metrics.json

Exit code 0 if it does, 1 if not, 2 if the file cannot be read as one. Standard library only.
"""

import json
import sys
from pathlib import Path
from typing import Any

MIN_PROMPTS = 400
Key = tuple[str, str, str]  # model, role, decoding
M0: Key = ("m0", "policy", "sampled")
M1: Key = ("m1", "policy", "sampled")
M1_GREEDY: Key = ("m1", "policy", "greedy")
BASE: Key = ("improver", "policy", "sampled")
IMPROVER: Key = ("improver", "improver", "sampled")


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The entries by model, role and decoding; whatever is missing or odd is a ValueError."""
    found: dict[Key, dict[str, Any]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["models"]:
        key = (entry["name"], entry["role"], entry["decoding"])
        if key in found:
            raise ValueError(f"{' '.join(key)} is there twice")
        low, high = entry["ci95"]
        if not 0 <= low <= entry["score"] <= high <= 1:
            raise ValueError(f"{' '.join(key)}: score {entry['score']} with interval {low} to {high}")
        found[key] = entry
    missing = [" ".join(key) for key in (M0, M1, M1_GREEDY, BASE, IMPROVER) if key not in found]
    if missing:
        raise ValueError(f"not there: {', '.join(missing)}")
    return found


def verdicts(found: dict[Key, dict[str, Any]]) -> list[tuple[bool, str]]:
    """Each promise with whether it holds."""
    score = {key: float(entry["score"]) for key, entry in found.items()}
    fewest = min(entry["n"] for entry in found.values())
    return [
        (0.3 <= score[M0] <= 0.6, f"m0 in the middle: {score[M0]:.3f} (0.3 to 0.6)"),
        (score[M1] - score[M0] >= 0.4, f"m1 above m0: {score[M1] - score[M0]:+.3f} (at least +0.400)"),
        (apart(found[M0], found[M1]), "the 95 % intervals of m0 and m1 are disjoint"),
        (score[M1_GREEDY] >= 0.97, f"m1 greedy: {score[M1_GREEDY]:.3f} (at least 0.970)"),
        (
            score[IMPROVER] - score[BASE] >= 0.2,
            f"improver above its own policy: {score[IMPROVER] - score[BASE]:+.3f} (at least +0.200)",
        ),
        (apart(found[BASE], found[IMPROVER]), "the 95 % intervals of policy and improver are disjoint"),
        (fewest >= MIN_PROMPTS, f"held-out prompts: {fewest} (at least {MIN_PROMPTS})"),
    ]


def apart(lower: dict[str, Any], upper: dict[str, Any]) -> bool:
    """Whether the lower one's interval ends below the upper one's."""
    return bool(lower["ci95"][1] < upper["ci95"][0])


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        results = verdicts(read(Path(sys.argv[1])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {sys.argv[1]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for good, text in results:
        print(f"{'ok    ' if good else 'FAILED'}  {text}")
    return 0 if all(good for good, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
