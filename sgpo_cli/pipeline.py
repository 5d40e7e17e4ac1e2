"""Runs the steps of a recipe: what is up to date is skipped, the rest runs in order, each its own process.

A crash or an out-of-memory kill takes one step, and GPU memory is always given back.
"""

import json
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sgpo_cli import artifacts, children, guard, identity, recipe
from sgpo_cli.errors import IntegrityError, StaleError, StoppedError, UsageError
from sgpo_cli.options import StageConfig
from sgpo_cli.step import Step

logger = logging.getLogger(__name__)

DONE, PARTIAL, MISSING, STALE, CHANGED = "up to date", "continues", "to do", "out of date", "changed"
DAMAGED, NEEDS = "damaged", "cannot run"
REPORT, RUN = "report.html", "run.json"
# A URL with what may be secret in it: user and password, query.
URL = re.compile(r"""(https?://)(?:[^\s/@"']*@)?([^\s?"']*)(?:\?[^\s"']*)?""")


@dataclass(frozen=True)
class PlannedStep:
    """A step of a recipe and what `sgpo run` would do with it."""

    spec: recipe.StepSpec
    config: StageConfig
    state: str
    why: str = ""


def plan(book: recipe.Recipe) -> list[PlannedStep]:
    """The steps in order, with the state each will have when its turn comes; changes nothing.

    Raises:
        UsageError: a prompt file or a Hub name of the recipe cannot be found.
    """
    steps: list[PlannedStep] = []
    for spec in book.steps.values():
        config = recipe.build_config(spec.stage, spec.options, f"{book.path}: steps.{spec.name}")
        waits_for = [step for step in steps if step.state != DONE and _reads(config, step.config)]
        missing = _missing_inputs(config, steps)
        try:
            state = (NEEDS, missing) if missing else _state(spec, config, waits_for)
        except IntegrityError as error:
            state = DAMAGED, str(error)
        steps.append(PlannedStep(spec, config, *state))
    return steps


def _missing_inputs(config: StageConfig, earlier: list[PlannedStep]) -> str:
    """What a step reads that neither exists nor is made by an earlier step."""
    for option, source, _ in identity.sources(config):
        made = any(Path(source).is_relative_to(step.config.output_dir) for step in earlier)
        if not made and not Path(source).exists() and not identity.looks_like_hub_name(source):
            return f"{option}: {source}: no such file or directory"
    return ""


def _reads(config: StageConfig, earlier: StageConfig) -> bool:
    made = Path(earlier.output_dir)
    return any(Path(source).is_relative_to(made) for _, source, _ in identity.sources(config))


def _state(spec: recipe.StepSpec, config: StageConfig, waits_for: list[PlannedStep]) -> tuple[str, str]:
    """The state of a step, and the reason when it is not plain."""
    directory = Path(config.output_dir)
    if not (directory / artifacts.REQUEST).exists():
        damaged = (directory / artifacts.MANIFEST).exists()
        return (DAMAGED, f"{directory / artifacts.REQUEST} is missing") if damaged else (MISSING, "")
    if waits_for:
        return STALE, f"{waits_for[0].spec.name} runs again"
    request = identity.request_of(spec.stage, config)
    before = artifacts.read_json(directory / artifacts.REQUEST)
    changes = request.changes(before)
    if changes:
        why = f"{directory} was made by another request\n  " + "\n  ".join(changes)
        return (STALE, "its inputs have changed") if request.only_inputs_changed(before) else (CHANGED, why)
    return (DONE if Step(directory, request).is_complete() else PARTIAL), ""


def run(book: recipe.Recipe, *, from_step: str | None, fresh: bool, flags: list[str]) -> None:
    """Run what is not up to date, and stop at the first failure.

    Args:
        from_step: this step and all after it are moved aside and run again.
        fresh: steps with other options or damaged files are moved aside and run again.
        flags: handed to every step's command.

    Raises:
        UsageError: an input is missing.
        StaleError, IntegrityError: a step's options or files changed and `fresh` is not given.
        StoppedError: a check's verdict, found now or in an earlier run, is not healthy.
        SystemExit: a step failed; the code is the step's.
    """
    redo = _from(book, from_step)
    steps = plan(book)
    for step in steps:  # a wrong path is found now, not when its turn comes hours later
        if step.state == NEEDS:
            raise UsageError(
                f"{book.path}: steps.{step.spec.name}.{step.why}",
                "run paths are relative to run_dir, others to where you are",
            )
    ran = False
    for name in book.steps:
        # Planned anew: the step before may just have been made, and its manifest is part of the request.
        step = next(step for step in plan(book) if step.spec.name == name)
        again = fresh or name in redo
        if step.state == DONE and name not in redo:
            logger.info("%s: up to date", name)
            _stop_if_unhealthy(book, step.spec, ran=ran)
            continue
        if step.state in (CHANGED, DAMAGED) and not again:
            kind = StaleError if step.state == CHANGED else IntegrityError
            raise kind(
                f"step {name}: {step.why}", f"{_command(book)} --fresh moves the old output aside and runs it anew"
            )
        logger.info("%s: runs (%s)%s", name, step.spec.stage, f", {step.why}" if step.state == STALE else "")
        anew = step.state in (STALE, CHANGED, DAMAGED) or name in redo
        _run_step(book, step.spec, [*flags, "--fresh"] if anew else flags)
        ran = True
        _stop_if_unhealthy(book, step.spec, ran=ran, said=True)
    if ran or not (book.run_dir / REPORT).exists():
        _write_report(book)


def _from(book: recipe.Recipe, step: str | None) -> set[str]:
    """The names of a step and all after it; none without a step."""
    names = list(book.steps)
    return set(names[names.index(book.step(step).name) :]) if step is not None else set()


def _stop_if_unhealthy(book: recipe.Recipe, spec: recipe.StepSpec, *, ran: bool, said: bool = False) -> None:
    """What a check has found stands in its manifest, so a later run stops there too.

    Args:
        said: the step has just told its user.
    """
    if _verdict(spec) == "healthy":
        return
    if ran or not (book.run_dir / REPORT).exists():
        _write_report(book)
    if said:
        raise SystemExit(StoppedError.exit_code)
    guard.refuse(Path(spec.options["output_dir"]))


def _verdict(spec: recipe.StepSpec) -> str:
    manifest = artifacts.read_manifest(Path(spec.options["output_dir"])) or {}
    return str(manifest.get("verdict", "healthy"))


def standing(book: recipe.Recipe, steps: list[PlannedStep]) -> dict[str, Any]:
    """What the checks so far have said: `best`, the last good model, and `stopped`, the check that ended the run.

    Empty while nothing has been checked. Paths are relative to the run's directory where they lie in it.
    """
    found: dict[str, Any] = {}
    for step in steps:
        manifest = artifacts.read_manifest(Path(step.config.output_dir)) if step.state == DONE else None
        if not manifest or "verdict" not in manifest:
            continue
        best = Path(manifest["best"])
        found["best"] = str(best.relative_to(book.run_dir) if best.is_relative_to(book.run_dir) else best)
        if manifest["verdict"] != "healthy":
            return found | {
                "stopped": {"step": step.spec.name, "verdict": manifest["verdict"], "reasons": manifest["reasons"]}
            }
    return found


def _write_report(book: recipe.Recipe) -> None:
    """The report of the run, by a process of its own: whatever becomes of it, the steps are done."""
    record = {"command": _command(book), "recipe": URL.sub(r"\1\2", book.path.read_text(encoding="utf-8"))}
    record |= standing(book, plan(book))
    artifacts.write_atomically(book.run_dir / RUN, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    command = ["report", str(book.run_dir)]
    if subprocess.run([sys.executable, "-m", "sgpo_cli", *command], stdout=subprocess.DEVNULL).returncode == 0:
        logger.info("report: %s", book.run_dir / REPORT)
    else:
        logger.warning("the steps are done, but the report was not written; try again: sgpo %s", shlex.join(command))


def _command(book: recipe.Recipe) -> str:
    return shlex.join(["sgpo", "run", str(book.path), *book.overrides])


def _run_step(book: recipe.Recipe, spec: recipe.StepSpec, flags: list[str]) -> None:
    command = [spec.stage, "--recipe", str(book.path), "--step", spec.name, *book.overrides, *flags]
    launcher = shlex.split(spec.launch) if spec.launch else [sys.executable]
    exits = book.run_dir / f".ranks-{spec.name}" if spec.launch else None
    code = children.run([*launcher, "-m", "sgpo_cli", *command], exits)
    if code == StoppedError.exit_code and _verdict(spec) != "healthy":
        return  # the check is done, and what it says ends the run
    if code != 0:
        what = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        print(f"step {spec.name} {what}; to continue: {_command(book)}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


def print_plan(book: recipe.Recipe, *, from_step: str | None = None, fresh: bool = False) -> None:
    """Print the plan: step, stage, start model, data, state; `run` with the same arguments would do it."""
    redo = _from(book, from_step)
    table = Table("step", "stage", "start model", "data", "state", title=f"{book.path}", title_justify="left")
    for step in plan(book):
        config = step.config
        models = [source for _, source, kind in identity.sources(config) if kind == "model"]
        data = [source for _, source, kind in identity.sources(config) if kind == "data"]
        anew = step.spec.name in redo or (fresh and step.state in (CHANGED, DAMAGED))
        state = "runs anew" if anew and step.state != MISSING else _shown(step)
        table.add_row(step.spec.name, step.spec.stage, ", ".join(models), ", ".join(data), state)
    _print(table)


def print_status(book: recipe.Recipe) -> None:
    """Print what each step has done and in which state it is."""
    table = Table("step", "stage", "state", "rows in", "rows out", "rejected", "seconds")
    steps = plan(book)
    for step in steps:
        manifest = {} if step.state == DAMAGED else artifacts.read_manifest(Path(step.config.output_dir)) or {}
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.get("rejected", {}).items())
        state = _shown(step)
        numbers = [str(manifest.get(key, "")) for key in ("rows_in", "rows_out")]
        table.add_row(step.spec.name, step.spec.stage, state, *numbers, dropped, str(manifest.get("seconds", "")))
    _print(table)
    found = standing(book, steps)
    if "best" in found:
        Console().print(f"best: {found['best']}", markup=False, highlight=False)
    if "stopped" in found:
        stopped = found["stopped"]
        text = "\n  ".join([f"stopped by {stopped['step']}: {stopped['verdict']}", *stopped["reasons"]])
        Console().print(text, markup=False, highlight=False)
    elif any(step.state != DONE for step in steps):
        fresh = " --fresh" if any(step.state in (CHANGED, DAMAGED) for step in steps) else ""
        Console().print(f"to continue: {_command(book)}{fresh}", markup=False, highlight=False)


def _shown(step: PlannedStep) -> str:
    return f"{step.state} ({step.why})" if step.why else step.state


def _print(table: Table) -> None:
    """Tables keep their columns in a file or pipe, where a terminal's width means nothing."""
    console = Console()
    Console(width=console.width if console.is_terminal else 160, soft_wrap=False).print(table)
