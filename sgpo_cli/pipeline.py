"""Runs the steps of a recipe: what is up to date is skipped, the rest runs in order, each its own process.

A crash or an out-of-memory kill takes one step, and GPU memory is always given back.
"""

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sgpo_cli import artifacts, identity, recipe
from sgpo_cli.configs import StageConfig
from sgpo_cli.errors import StaleError, UsageError
from sgpo_cli.step import Request, Step

logger = logging.getLogger(__name__)

DONE, PARTIAL, MISSING, STALE, CHANGED = "up to date", "continues", "to do", "out of date", "changed"


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
        UsageError: an input does not exist.
        IntegrityError: a finished step's files were changed.
    """
    steps: list[PlannedStep] = []
    for spec in book.steps.values():
        config = recipe.build_config(spec.stage, spec.options, f"{book.path}: steps.{spec.name}")
        _refuse_missing_inputs(book, spec, config, steps)
        waits_for = [step for step in steps if step.state != DONE and _reads(config, step.config)]
        steps.append(PlannedStep(spec, config, *_state(spec, config, waits_for)))
    return steps


def _refuse_missing_inputs(
    book: recipe.Recipe, spec: recipe.StepSpec, config: StageConfig, earlier: list[PlannedStep]
) -> None:
    """A wrong path is found before the first step runs, not when its turn comes hours later."""
    for option, source, _ in identity.sources(config):
        made = any(Path(source).is_relative_to(step.config.output_dir) for step in earlier)
        if not made and not Path(source).exists() and not identity.looks_like_hub_name(source):
            raise UsageError(f"{book.path}: steps.{spec.name}.{option}: {source}: no such file or directory")


def _reads(config: StageConfig, earlier: StageConfig) -> bool:
    made = Path(earlier.output_dir)
    return any(Path(source).is_relative_to(made) for _, source, _ in identity.sources(config))


def _state(spec: recipe.StepSpec, config: StageConfig, waits_for: list[PlannedStep]) -> tuple[str, str]:
    """The state of a step, and the reason when it is not plain."""
    directory = Path(config.output_dir)
    if not (directory / artifacts.REQUEST).exists():
        return MISSING, ""
    if waits_for:
        return STALE, f"{waits_for[0].spec.name} runs again"
    request = identity.request_of(spec.stage, config)
    before = artifacts.read_json(directory / artifacts.REQUEST)
    changes = request.changes(before)
    if changes:
        return (STALE if request.only_inputs_changed(before) else CHANGED), "; ".join(changes)
    return (DONE if Step(directory, request).is_complete() else PARTIAL), ""


def run(book: recipe.Recipe, *, from_step: str | None, fresh: bool, flags: list[str]) -> None:
    """Run what is not up to date, and stop at the first failure.

    Args:
        from_step: this step and all after it are moved aside and run again.
        fresh: steps that were made by another request are moved aside and run again.
        flags: handed to every step's command.

    Raises:
        StaleError: a step's options changed and `fresh` is not given.
        SystemExit: a step failed; the code is the step's.
    """
    if from_step is not None:
        book.step(from_step)
    names = [step.spec.name for step in plan(book)]
    redo = set(names[names.index(from_step) :]) if from_step else set()
    for name in names:
        # Planned anew: the step before may just have been made, and its manifest is part of the request.
        step = next(step for step in plan(book) if step.spec.name == name)
        if step.state == DONE and name not in redo:
            logger.info("%s: up to date", name)
            continue
        if step.state == CHANGED and not fresh and name not in redo:
            raise StaleError(
                f"step {name}: {step.config.output_dir} was made by another request\n  "
                + step.why.replace("; ", "\n  "),
                f"{_command(book)} --fresh moves it aside and runs it again",
            )
        if step.state in (STALE, CHANGED) or name in redo:
            request = Request(step.spec.stage, 0, {})
            if aside := Step(step.config.output_dir, request).move_aside():
                logger.info("%s: %s; the old output is in %s", name, step.why or "asked for again", aside)
        logger.info("%s: runs (%s)", name, step.spec.stage)
        _run_step(book, step.spec, flags)


def _command(book: recipe.Recipe) -> str:
    return shlex.join(["sgpo", "run", str(book.path), *book.overrides])


def _run_step(book: recipe.Recipe, spec: recipe.StepSpec, flags: list[str]) -> None:
    command = [spec.stage, "--recipe", str(book.path), "--step", spec.name, *book.overrides, *flags]
    launcher = shlex.split(spec.launch) if spec.launch else [sys.executable]
    process = subprocess.Popen([*launcher, "-m", "sgpo_cli", *command], preexec_fn=_end_with_parent(spec.launch))
    try:
        code = process.wait()
    except BaseException:
        _stop(process)
        raise
    if code != 0:
        what = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        print(f"step {spec.name} {what}; to continue: {_command(book)}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the step to leave; after Ctrl-C in a terminal it is on its way already."""
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def _end_with_parent(launch: str) -> Callable[[], Any] | None:
    """A step must not outlive a `sgpo run` that was killed: it would hold the lock against the next one."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig = 1
    # A launcher gets the chance to stop its ranks.
    end = signal.SIGTERM if launch else signal.SIGKILL
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(pr_set_pdeathsig, end)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def print_plan(book: recipe.Recipe) -> None:
    """Print the plan: step, stage, start model, data, state."""
    table = Table("step", "stage", "start model", "data", "state", title=f"{book.path}", title_justify="left")
    for step in plan(book):
        config = step.config
        models = [source for _, source, kind in identity.sources(config) if kind == "model"]
        data = [source for _, source, kind in identity.sources(config) if kind == "data"]
        state = f"{step.state} ({step.why})" if step.why else step.state
        table.add_row(step.spec.name, step.spec.stage, ", ".join(models), ", ".join(data), state)
    _print(table)


def print_status(book: recipe.Recipe) -> None:
    """Print what each step has done and in which state it is."""
    table = Table("step", "stage", "state", "rows in", "rows out", "rejected", "seconds")
    steps = plan(book)
    for step in steps:
        manifest = artifacts.read_manifest(Path(step.config.output_dir)) or {}
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.get("rejected", {}).items())
        state = f"{step.state} ({step.why})" if step.why else step.state
        numbers = [str(manifest.get(key, "")) for key in ("rows_in", "rows_out")]
        table.add_row(step.spec.name, step.spec.stage, state, *numbers, dropped, str(manifest.get("seconds", "")))
    _print(table)
    if any(step.state != DONE for step in steps):
        Console().print(f"to continue: {_command(book)}", markup=False, highlight=False)


def _print(table: Table) -> None:
    """Tables keep their columns in a file or pipe, where a terminal's width means nothing."""
    console = Console()
    Console(width=console.width if console.is_terminal else 160, soft_wrap=False).print(table)
