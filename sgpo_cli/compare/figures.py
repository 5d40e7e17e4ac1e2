"""What the evaluated models scored, what they cost, and how far they are apart, over seeds.

A method is an evaluated model: its cost is that of all steps that it was built from, found by the digests in
their manifests, so a shared step counts for each method that uses it. Evaluation is nobody's cost.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_cli.compare.seeds import SeedRun
from sgpo_cli.compare.student import margin
from sgpo_cli.errors import IncompleteError, UsageError
from sgpo_cli.report.collect import Run, StepFacts, collect
from sgpo_cli.trl_options import did_you_mean

COSTS = ("generated_tokens", "teacher_calls", "training_tokens", "pairs", "dpo_steps", "seconds")
NO_OTHER = ("self", "reference")  # teachers that are nobody but the policy, or nobody at all

Figures = dict[str, float]
"""Figures by name: a score by answer, as policy_sampled, or a cost by its name in COSTS."""


@dataclass
class Method:
    """An evaluated model: one entry for each seed, in the order of the seeds."""

    name: str
    scores: list[Figures] = field(default_factory=list)
    costs: list[Figures] = field(default_factory=list)

    def score(self, answer: str) -> list[float] | None:
        """A score for each seed; None if this answer of the model was not asked for."""
        return [scores[answer] for scores in self.scores] if answer in self.scores[0] else None


@dataclass(frozen=True)
class Comparison:
    """Methods in the order of evaluation; `answers` as policy_sampled; `versions` that steps were made with."""

    seeds: list[int]
    methods: list[Method]
    answers: list[str]
    against: str
    versions: dict[str, list[str]]

    def differences(self, method: Method, answer: str) -> list[float] | None:
        """What it scored more than the method that all are compared with, seed by seed; None if there is no such."""
        other = next(each for each in self.methods if each.name == self.against)
        ours, theirs = method.score(answer), other.score(answer)
        if method is other or ours is None or theirs is None:
            return None
        return [mine - its for mine, its in zip(ours, theirs, strict=True)]


def estimate(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds, and half of its 95 % interval (None for one seed)."""
    return statistics.fmean(values), margin(values)


def read(runs: Sequence[SeedRun], against: str | None) -> Comparison:
    """The figures of finished runs.

    Raises:
        UsageError: there is no score, none of `against`, or two different ones of the same model.
        IncompleteError: a seed lacks what another one has.
        IntegrityError: a file is not what its manifest says.
    """
    methods: dict[str, Method] = {}
    versions: dict[str, set[str]] = {}
    for run in runs:
        found = collect(run.directory)
        scores = _scores(run, found)
        if methods and scores.keys() != methods.keys():
            _refuse_other(run, methods.keys() ^ scores.keys())
        for name, each in scores.items():
            method = methods.setdefault(name, Method(name))
            if method.scores and each.keys() != method.scores[0].keys():
                _refuse_other(run, (f"{name} {answer}" for answer in each.keys() ^ method.scores[0].keys()))
            method.scores.append(each)
            method.costs.append(cost(found, _ancestors(run, found, name)))
        for step in found.steps:
            for package, version in (step.manifest.versions if step.manifest else {}).items():
                versions.setdefault(package, set()).add(version)
    if not methods:
        raise UsageError("no evaluate step has scores", "win rates alone are not compared: give it a pointwise judge")
    answers = list(dict.fromkeys(answer for method in methods.values() for answer in method.scores[0]))
    return Comparison(
        [run.seed for run in runs],
        list(methods.values()),
        answers,
        chosen(against, list(methods)),
        {package: sorted(found) for package, found in sorted(versions.items())},
    )


def _refuse_other(run: SeedRun, names: Any) -> None:
    raise IncompleteError(
        f"{run.directory}: {', '.join(sorted(names))}: scored with some of the seeds only",
        "see metrics.json of its evaluate step, or leave this seed out",
    )


def chosen(name: str | None, names: Sequence[str]) -> str:
    """The method that all are compared with. Raises UsageError if there is none of that name."""
    if name is None:
        return "sgpo" if "sgpo" in names else names[0]
    if name not in names:
        hint = did_you_mean(name, names)
        raise UsageError(f"--against {name}: no such model{hint}", f"those evaluated: {', '.join(names)}")
    return name


def _evaluations(run: SeedRun, found: Run) -> list[StepFacts]:
    """The finished evaluate steps of the recipes."""
    names = [spec.name for book in run.books for spec in book.steps.values() if spec.stage == "evaluate"]
    steps = {step.name: step for step in found.steps if step.manifest}
    if missing := [name for name in names if name not in steps]:
        raise IncompleteError(f"{run.directory / missing[0]}: this step has not finished", "run the command again")
    return [steps[name] for name in dict.fromkeys(names)]


def _scores(run: SeedRun, found: Run) -> dict[str, Figures]:
    """The scores of each evaluated model."""
    scores: dict[str, Figures] = {}
    for step in _evaluations(run, found):
        for entry in step.metrics.models if step.metrics else []:
            answer = "_".join(part for part in (entry.role, entry.decoding) if part)
            if scores.setdefault(entry.name, {}).setdefault(answer, entry.score) != entry.score:
                raise UsageError(
                    f"{step.directory}: {entry.name} {answer} has another score in an earlier step",
                    "let one evaluate step score each model",
                )
    return scores


def _ancestors(run: SeedRun, found: Run, method: str) -> list[str]:
    """The steps of the run that an evaluated model was built from, itself included."""
    sources = {step.name: [source.step for source in step.sources if source.step] for step in found.steps}
    waiting = [
        source.step
        for step in _evaluations(run, found)
        for source in step.sources
        if source.option.startswith("models.") and source.step and source.label.rpartition("/")[2] == method
    ]
    names: list[str] = []
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.append(name)
            waiting.extend(sources[name])
    return names


def cost(found: Run, names: Sequence[str]) -> Figures:
    """What the named steps took together, by the keys of COSTS."""
    bills = [_bill(step) for step in found.steps if step.name in names]
    return {name: sum(bill.get(name, 0) for bill in bills) for name in COSTS}


def _bill(step: StepFacts) -> Mapping[str, float]:
    """What one step took; a teacher is asked about every row that its step has read."""
    manifest = step.manifest
    if manifest is None:
        return {}
    teacher = manifest.config.get("teacher")
    trained = manifest.training
    pairs = manifest.stage == "dpo"
    return {
        "generated_tokens": manifest.total("completion_tokens") or 0,
        "teacher_calls": (manifest.rows_in or 0) if teacher and teacher not in NO_OTHER else 0,
        "training_tokens": trained.tokens if trained else 0,
        "pairs": (manifest.rows_out or 0) if pairs else 0,
        "dpo_steps": trained.steps if trained and pairs else 0,
        "seconds": manifest.seconds,
    }
