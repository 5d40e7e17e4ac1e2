"""Reads a run directory: its steps in the order in which one was built on the other."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgpo_cli import artifacts, quality
from sgpo_cli.configs import STAGES
from sgpo_cli.errors import IntegrityError, UsageError
from sgpo_cli.measures import finite
from sgpo_cli.options import own_options
from sgpo_cli.readers.strict import printable
from sgpo_cli.report.schema import Log, Manifest, Metrics, Quality, Request, RunRecord, checked

ASIDE = re.compile(r"\.old-\d+$")
MANIFEST_BYTES = 1 << 24
LOG_BYTES = 1 << 28
RUN = "run.json"
TRAINING_LOG = "training_log.json"


@dataclass(frozen=True)
class Source:
    """What a step was built from: an option, "model" or "data", and a step of this run or a name."""

    option: str
    kind: str
    label: str
    step: str | None = None


@dataclass
class StepFacts:
    """A step and what it has left; without a manifest it has not finished."""

    name: str
    directory: Path
    request: Request
    manifest: Manifest | None = None
    sources: list[Source] = field(default_factory=list)
    metrics: Metrics | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    quality: Quality | None = None

    @property
    def stage(self) -> str:
        return self.request.stage


@dataclass(frozen=True)
class Run:
    """A run directory."""

    name: str
    steps: list[StepFacts]
    record: RunRecord | None


def collect(directory: Path) -> Run:
    """The steps of a run directory, or the one step that it is.

    Raises:
        UsageError: there is no step in it.
        IntegrityError: a file is not what sgpo wrote.
    """
    if not directory.is_dir():
        raise UsageError(f"{printable(str(directory))}: no such directory", "name a recipe's run_dir, as runs/demo")
    found = [_read(path, directory.resolve()) for path in _steps(directory)]
    if not found:
        raise UsageError(
            f"{printable(str(directory))}: no step in it", "name a recipe's run_dir, or a step's directory"
        )
    names = {artifacts.sha256_file(step.directory / artifacts.MANIFEST): step.name for step in found if step.manifest}
    for step in found:
        step.sources = list(_sources(step.request, names))
    record = directory / RUN
    return Run(
        directory.resolve().name,
        _ordered(found),
        checked(RunRecord, _json(record, directory.resolve()), record) if record.exists() else None,
    )


def _steps(directory: Path) -> list[Path]:
    """The directory itself if it is a step, or those in it."""
    marks = (artifacts.REQUEST, artifacts.MANIFEST)
    if any((directory / mark).exists() for mark in marks):
        return [directory]
    inside = sorted(path for path in directory.iterdir() if path.is_dir() and not ASIDE.search(path.name))
    return [path for path in inside if any((path / mark).exists() for mark in marks)]


def _json(path: Path, root: Path, limit: int = MANIFEST_BYTES) -> dict[str, Any]:
    """A JSON file of the run: of bearable size, and lying in it."""
    _refuse_outside(path, root)
    if path.stat().st_size > limit:
        raise IntegrityError(f"{path}: larger than {limit >> 20} MiB")
    try:
        return artifacts.read_json(path)
    except RecursionError:
        raise IntegrityError(f"{path}: nested too deep") from None


def _refuse_outside(path: Path, root: Path) -> None:
    if not path.is_file() or not path.resolve().is_relative_to(root):
        raise IntegrityError(f"{path}: not a file of this run", "links that lead out of a run are not followed")


def _read(directory: Path, root: Path) -> StepFacts:
    inside = directory.resolve()
    if not inside.is_relative_to(root):
        raise IntegrityError(f"{directory}: not a part of this run", "links that lead out of a run are not followed")
    path = directory / artifacts.MANIFEST
    name = directory.resolve().name
    if not path.exists():
        request = directory / artifacts.REQUEST
        state = sorted(directory.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
        history = checked(Log, _json(state[-1], inside, LOG_BYTES), state[-1]).log_history if state else []
        return StepFacts(name, directory, checked(Request, _json(request, inside), request), log=_numbers(history))
    _json(path, inside)
    manifest = checked(Manifest, artifacts.read_manifest(directory), path)
    step = StepFacts(name, directory, manifest, manifest, quality=manifest.quality)
    if (metrics := _output(step, "metrics.json")) is not None:
        step.metrics = checked(Metrics, _json(metrics, inside), metrics)
    if (log := _output(step, TRAINING_LOG)) is not None:
        step.log = _numbers(_list(log, inside))
    for name in artifacts.DATA_FILES:
        _output(step, name)
    if step.quality is None and quality.has_sides(directory):
        step.quality = checked(Quality, quality.describe(directory), directory)
    return step


def _output(step: StepFacts, name: str) -> Path | None:
    """An output of the step, once it has been compared with the manifest's digest."""
    path = step.directory / name
    if step.manifest is None or name not in step.manifest.outputs:
        if path.exists():
            raise IntegrityError(f"{path}: not in {artifacts.MANIFEST}", "run the step again with --fresh")
        return None
    facts = step.manifest.outputs[name]
    if not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("sha256"), str):
        raise IntegrityError(f"{step.directory / artifacts.MANIFEST}: outputs.{name}: not what sgpo writes")
    if path.exists():
        _refuse_outside(path, step.directory.resolve())
    artifacts.verify(step.directory, under=path)
    return path


def _list(path: Path, root: Path) -> list[dict[str, Any]]:
    """A training log: a list of records."""
    _refuse_outside(path, root)
    if path.stat().st_size > LOG_BYTES:
        raise IntegrityError(f"{path}: larger than {LOG_BYTES >> 20} MiB")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not valid JSON ({error})") from None
    return checked(list[dict[str, Any]], value, path)


def _numbers(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The finite numbers of the records that have a step."""
    numbers = [{name: value for name, value in record.items() if finite(value)} for record in history]
    return [record for record in numbers if "step" in record]


def _sources(request: Request, names: dict[str, str]) -> Iterator[Source]:
    """What the step read, from the digests of its request."""
    stage = STAGES.get(request.stage)
    kinds = {name: entry.metadata["kind"] for name, entry in own_options(stage).items()} if stage else {}
    for option, digest in request.inputs.items():
        kind = "data" if kinds.get(option.partition(".")[0], "data") == "data" else "model"
        scheme, _, rest = digest.partition(":")
        if scheme != "step":
            label = rest.partition("@")[0] if scheme == "hub" else f"{scheme} {rest[:12]}"
            yield Source(option, kind, label)
            continue
        sha, _, inner = rest.partition(":")
        step = names.get(sha)
        label = f"{step or 'a step outside this run'}{'' if inner in ('', '.') else '/' + inner}"
        yield Source(option, kind, label, step)


def _ordered(steps: list[StepFacts]) -> list[StepFacts]:
    """Each step after those that it was built from; by time of completion where that leaves a choice."""
    waiting = sorted(steps, key=lambda step: (step.manifest.finished if step.manifest else "~", step.name))
    done: list[StepFacts] = []
    while waiting:
        names = {step.name for step in done}
        ready = (step for step in waiting if all(each.step in names for each in step.sources if each.step))
        step = next(ready, waiting[0])
        waiting.remove(step)
        done.append(step)
    return done
