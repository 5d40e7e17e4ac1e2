"""Does the guard stop bad rounds and let good ones pass? Hostile and healthy rounds on the demo world.

    python benchmarks/guard.py --seeds 1 2 3 4 --runs runs/seeds

Each seed's base is a run of `recipes/demo.yaml` (world, m0, targets, filtered, improver, pairs, m1), made if it is
not there: runs of `demo_seeds.py` are taken as they are, and only what is hostile is made anew, beside them in
`guard-<seed>`. Healthy: the base's first round, and a second one on other prompts from M1 with an improver trained
anew on M1's answers; with `--ablations runs/ablations` also the rounds of `sgpo compare recipes/ablations.yaml` for
those of the seeds that it has. Hostile: learning rate x 10; temperature 1.5; an improver with noise on its weights;
one taught by a teacher that sends junk alone; one without replay; pairs of which 49 in 50 are the same text twice;
chosen and rejected exchanged. Every round is trained to its end, whatever the guard says, so that it shows what a stop
prevented: `after` against `start` is what the policy would have become, `result` what the guard's best scores. Of
pairs that are nearly all the same text twice there is nothing to learn: that stop comes without a fall.
Writes `benchmarks/guard.json`. What is finished is not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = RECIPES / "demo.yaml"
NOISE = 0.3  # standard deviations of a matrix
STOPPED = 9
ABLATED = {  # round of recipes/ablations.yaml: its pairs, the model that DPO starts from, the last good model
    "sgpo": ("pairs", "improver", "improver"),
    "quantile": ("quantile-pairs", "quantile-improver", "quantile-improver"),
    "two-steps": ("two-step-pairs", "improver", "improver"),
    "sampled-chosen": ("sampled-pairs", "improver", "improver"),
    "round-1": ("round-1-pairs", "improver", "improver"),
    "unified-2": ("unified-2-pairs", "round-1", "round-1"),
    "unified-3": ("unified-3-pairs", "unified-2", "unified-2"),
    "retrained-2": ("retrained-2-pairs", "retrained-2-improver", "round-1"),
    "retrained-3": ("retrained-3-pairs", "retrained-3-improver", "retrained-2"),
}
Row = dict[str, Any]


class Bench:
    """The rounds of one seed; models and data are named by their directories."""

    def __init__(self, seed: int, runs: Path, recipe: Path = RECIPE) -> None:
        self.seed, self.base, self.own = seed, runs / f"seed-{seed}", runs / f"guard-{seed}"
        self.own.mkdir(parents=True, exist_ok=True)
        self.heldout = self.base / "world/heldout"
        self._sgpo("run", recipe, "--run-dir", self.base, "--seed", seed)

    def _sgpo(self, *arguments: object) -> int:
        code = subprocess.run([sys.executable, "-m", "sgpo_cli", *map(str, arguments)]).returncode
        if code not in (0, 3, STOPPED):  # 3: no good row is left, so there is nothing to train on
            raise SystemExit(code)
        return code

    def step(self, name: str, like: str, stage: str, **changed: object) -> Path | None:
        """A step of the demo recipe with other options, in a directory of its own; None if no row is left."""
        flags = [part for key, value in changed.items() for part in (f"--{key.replace('_', '-')}", value)]
        recipe = ["--recipe", RECIPE, "--run-dir", self.base, "--step", like, "--seed", self.seed]
        code = self._sgpo(stage, *recipe, *flags, "--output-dir", self.own / name)
        return None if code == 3 else self.own / name

    def score(self, model: Path) -> dict[str, float]:
        """Mean scores on the held-out prompts, with half the 95 % interval."""
        output = self.own / f"scores-{model.name}"
        flags = ["--models", model, "--dataset", self.heldout, "--judge", "demo", "--max-new-tokens", 56]
        answers = [part for answer in ("policy_sampled", "policy_greedy") for part in ("--answers", answer)]
        self._sgpo("evaluate", *flags, *answers, "--batch-size", 200, "--output-dir", output)
        entries = json.loads((output / "metrics.json").read_text())["models"]
        found = {entry["decoding"]: entry["score"] for entry in entries}
        return found | {"half": max((entry["ci95"][1] - entry["ci95"][0]) / 2 for entry in entries)}

    def check(self, name: str, stage: str, judge: str | None, *flags: object) -> dict[str, Any]:
        """The verdict of a check; also that of one that was made before."""
        output = self.own / f"{name}-{stage}-{judge or 'alone'}"
        with_judge = ["--judge", judge] if judge else []
        self._sgpo(stage, *flags, *with_judge, "--seed", self.seed, "--output-dir", output)
        verdict: dict[str, Any] = json.loads((output / "verdict.json").read_text())
        return verdict

    def round(self, name: str, start: Path, pairs: Path | None, before: Path, **training: object) -> Row:
        """A DPO from `start`, checked before and after; `before` is the last good model."""
        row: Row = {"seed": self.seed, "round": name, "start": self.score(before)}
        if pairs is None:
            return row | {"verdicts": {}, "stopped": {"demo": True, "alone": True}, "why": "no pair was left"}
        model = self.step(f"{name}-m1", "m1", "dpo", model_name_or_path=start, dataset=pairs, **training)
        if model is None:
            raise SystemExit(3)
        return self.judged_round(row, start, pairs, before, model)

    def judged_round(self, row: Row, start: Path, pairs: Path, before: Path, model: Path) -> Row:
        """What came of a round and what both checks say of it, with the demo's judge and without one."""
        name = row["round"]
        row["after"] = self.score(model)
        row["verdicts"], row["stopped"], row["result"] = {}, {}, {}
        for judge in ("demo", None):
            first = self.check(name, "check-pairs", judge, "--dataset", pairs, "--policy", start, "--previous", before)
            common = ["--dataset", self.heldout, "--model", model, "--previous", before, "--max-new-tokens", 56]
            common += ["--max-rows", 200]
            second = self.check(name, "check-policy", judge, *common, "--batch-size", 200)
            key = judge or "alone"
            healthy = first["verdict"] == "healthy"
            best = Path(second["best"] if healthy else first["best"])
            row["verdicts"][key] = {"pairs": first, "policy": second}
            row["stopped"][key] = not healthy or second["verdict"] != "healthy"
            row["result"][key] = row["after"] if best == model else row["start"]
        return row


def _noisy(bench: Bench) -> Path:
    """The improver with noise on its matrices."""
    import torch
    from safetensors.torch import load_file, save_file

    made = bench.own / "noisy"
    if not (made / "model.safetensors").exists():
        own = shutil.ignore_patterns("checkpoint-*", "request.json", "manifest.json", "model.safetensors", ".lock")
        shutil.copytree(bench.base / "improver", made, ignore=own, dirs_exist_ok=True)
        dice = torch.Generator().manual_seed(bench.seed)
        weights = load_file(bench.base / "improver/model.safetensors")
        for name, weight in weights.items():
            if weight.dim() > 1:
                weights[name] = weight + NOISE * weight.std() * torch.randn(weight.shape, generator=dice)
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


def _rewritten(bench: Bench, name: str, change: Callable[[int, Row], Row]) -> Path:
    """The base's pairs, each changed, as a file."""
    made = bench.own / f"{name}.jsonl"
    lines = (bench.base / "pairs/train.jsonl").read_text().splitlines()
    made.write_text("".join(json.dumps(change(number, json.loads(line))) + "\n" for number, line in enumerate(lines)))
    return made


def healthy(bench: Bench) -> list[Callable[[], Row]]:
    base = bench.base

    def second() -> Row:
        """M1's answers to prompts with references that no step has seen, a teacher without junk, fresh pairs."""
        world = bench.own / "world"
        bench._sgpo("make-demo", "--num-sft", 1500, "--num-prompts", 1200, "--num-heldout", 10,
                    "--seed", bench.seed + 1000, "--output-dir", world)  # fmt: skip
        targets = bench.step("targets2", "targets", "make-targets", policy=base / "m1", dataset=world / "sft",
                             teacher="demo:0.0", gates="none")  # fmt: skip
        improver = bench.step("improver2", "improver", "train-improver", model_name_or_path=base / "m1",
                              dataset=targets, learning_rate=5e-4)  # fmt: skip
        pairs = bench.step("pairs2", "pairs", "gen-pairs", policy=improver, dataset=world / "prompts")
        assert improver is not None
        return bench.round("second", improver, pairs, base / "m1")

    return [lambda: bench.round("first", base / "improver", base / "pairs", base / "improver"), second]


def ablated(seed: int, runs: Path) -> list[Callable[[], Row]]:
    """The rounds of a finished comparison; only checks and scores are made anew."""
    if not (runs / f"seed-{seed}/ablation-scores/manifest.json").exists():
        return []
    bench = Bench(seed, runs, RECIPES / "ablations.yaml")

    def look(name: str) -> Row:
        pairs, start, before = (bench.base / step for step in ABLATED[name])
        row = {"seed": seed, "round": name, "start": bench.score(before)}
        return bench.judged_round(row, start, pairs, before, bench.base / name)

    return [lambda name=name: look(name) for name in ABLATED]  # type: ignore[misc]


def hostile(bench: Bench) -> list[Callable[[], Row]]:
    base = bench.base
    start, pairs = base / "improver", base / "pairs"

    def made(name: str, model: Path | None, before: Path, **generation: object) -> Row:
        assert model is not None
        return bench.round(
            name, model, bench.step(f"{name}-pairs", "pairs", "gen-pairs", policy=model, **generation), before
        )

    def junk() -> Row:
        targets = bench.step("junk-targets", "targets", "make-targets", teacher="demo:1.0", gates="none")
        return made("junk", bench.step("junk-improver", "improver", "train-improver", dataset=targets), base / "m0")

    def without_replay() -> Row:
        return made("no-replay", bench.step("lean", "improver", "train-improver", replay_ratio=0), base / "m0")

    def swapped(number: int, row: Row) -> Row:
        return row | {"chosen": row["rejected"], "rejected": row["chosen"]}

    def identical(number: int, row: Row) -> Row:
        return row | ({"chosen": row["rejected"]} if number % 50 else {})

    return [
        lambda: bench.round("lr-x10", start, pairs, start, learning_rate=8e-3),
        lambda: made("hot", start, start, temperature=1.5),
        lambda: made("noisy", _noisy(bench), start),
        junk,
        without_replay,
        lambda: bench.round("identical", start, _rewritten(bench, "identical", identical), start),
        lambda: bench.round("swapped", start, _rewritten(bench, "swapped", swapped), start),
    ]


def judged(row: Row) -> Row:
    """What fell in the round, and whether what stands after the guard is worse than the start.

    A policy falls by more than both intervals; an improver falls when its improvements of the new model's answers are
    certainly worse than those answers, by more than 0.02.
    """

    def fell(scores: dict[str, float]) -> bool:
        first = row["start"]
        return any(scores[name] < first[name] - first["half"] - scores["half"] for name in ("sampled", "greedy"))

    apart = [0.0, 0.0, 0.0]
    if row["verdicts"]:
        apart = row["verdicts"]["demo"]["policy"]["measures"]["differences"]["improver_over_policy"]
    return row | {
        "policy_fell": "after" in row and fell(row["after"]),
        "improver_fell": apart[0] < -0.02 and apart[2] < 0,
        "result_fell": {key: fell(found) for key, found in row.get("result", {}).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--ablations", type=Path, help="run_dir of a finished comparison of recipes/ablations.yaml")
    parser.add_argument("--rounds", nargs="*", default=["healthy", "hostile"], choices=["healthy", "hostile"])
    arguments = parser.parse_args()
    rows: dict[str, list[Row]] = {kind: [] for kind in arguments.rounds}
    for seed in arguments.seeds:
        bench = Bench(seed, arguments.runs)
        for kind, found in rows.items():
            made = {"healthy": healthy, "hostile": hostile}[kind](bench)
            if kind == "healthy" and arguments.ablations:
                made += ablated(seed, arguments.ablations)
            for each in made:
                found.append(judged(each()))
                machine.write("guard", {"summary": summary(rows), "rounds": rows})  # a stop costs one round
    print(json.dumps(summary(rows), indent=1))


def summary(rows: dict[str, list[Row]]) -> dict[str, dict[str, dict[str, int]]]:
    """Per kind and judge: rounds, stops, falls that were not stopped, stops without a fall, and results that fell."""

    def counts(found: list[Row], key: str) -> dict[str, int]:
        free = [row for row in found if not row["stopped"][key]]
        return {
            "rounds": len(found),
            "stopped": len(found) - len(free),
            "policy_fell": sum(row["policy_fell"] for row in found),
            "policy_fell_not_stopped": sum(row["policy_fell"] for row in free),
            "improver_fell": sum(row["improver_fell"] for row in found),
            "improver_fell_not_stopped": sum(row["improver_fell"] for row in free),
            "stopped_without_a_fall": sum(
                row["stopped"][key] and not row["policy_fell"] and not row["improver_fell"] for row in found
            ),
            "result_below_start": sum(row["result_fell"].get(key, False) for row in found),
        }

    return {kind: {key: counts(found, key) for key in ("demo", "alone")} for kind, found in rows.items()}


if __name__ == "__main__":
    main()
