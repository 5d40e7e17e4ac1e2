"""Recipes once per seed, some seeds at a time, each recipe as one `sgpo run`.

All in one thread: a signal then stops every run, and none is started in between.
"""

import logging
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import typer

from sgpo_cli import children, recipe
from sgpo_cli.errors import StoppedError, UsageError

logger = logging.getLogger(__name__)
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class SeedRun:
    """What is run with one seed: the recipes in order, all in one run directory."""

    seed: int
    directory: Path
    books: tuple[recipe.Recipe, ...]


def parse(text: str) -> list[int]:
    """`5` is 1 to 5; `1,2,7` is that list, and `7,` is 7 alone.

    Raises:
        UsageError: it is neither, or names a seed twice.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    seeds = numbers if "," in text else [*range(1, 1 + min(sum(numbers), MOST_SEEDS + 1))]
    if not seeds or len(seeds) > MOST_SEEDS or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: no number of seeds, and no list of different ones", "5, or 1,2,7")
    return seeds


def plan(paths: Sequence[Path], run_dir: Path | None, seeds: Sequence[int]) -> list[SeedRun]:
    """The runs, one for each seed, in `RUN_DIR/seed-K`; changes nothing.

    Args:
        run_dir: used instead of the one that the recipes have.

    Raises:
        UsageError: a recipe is wrong, or several do not fit together.
    """
    books = [recipe.read(path) for path in paths]
    places = {book.run_dir for book in books}
    if run_dir is None and len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise UsageError(f"the recipes have different run directories: {names}", "name one with --run-dir")
    base = run_dir or places.pop()
    runs = []
    for seed in seeds:
        directory = base / f"seed-{seed}"
        runs.append(SeedRun(seed, directory, tuple(recipe.read(path, run_dir=directory, seed=seed) for path in paths)))
    _check_shared(runs[0].books)
    return runs


def _check_shared(books: Sequence[recipe.Recipe]) -> None:
    """Steps of one name are one step, and there is something to compare."""
    known: dict[str, tuple[recipe.StepSpec, Path]] = {}
    for book in books:
        for name, spec in book.steps.items():
            other, where = known.setdefault(name, (spec, book.path))
            if other != spec:
                raise UsageError(
                    f"{book.path}: steps.{name} is not the step of that name in {where}",
                    "the recipes share one run directory: rename one of the two",
                )
    if not any(spec.stage == "evaluate" for spec, _ in known.values()):
        raise UsageError("no recipe has an evaluate step", "what it scores is compared")


def evaluated(run: SeedRun) -> list[str]:
    """The names of the models that will be scored; empty if files are among them, whose names stand in them."""
    steps = [spec for book in run.books for spec in book.steps.values() if spec.stage == "evaluate"]
    models = [Path(model) for spec in steps for model in spec.options["models"]]
    return [] if any(model.is_file() for model in models) else [model.name for model in models]


class _Running:
    """One seed at work: its recipes, one process after the other."""

    def __init__(self, run: SeedRun, environment: dict[str, str]) -> None:
        self.seed = run.seed
        self._waiting = list(run.books)
        self._environment = environment
        self._rest = b""
        self._start()

    def _start(self) -> None:
        book = self._waiting.pop(0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sgpo_cli", "run", str(book.path), *book.overrides],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=children.end_with_parent(is_launcher=True),
        )

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def pass_on(self) -> bool:
        """Print whole lines with the seed before them; False at the end of the output."""
        read = os.read(self.output.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + read).split(b"\n")
        if not read and self._rest:
            lines, self._rest = [self._rest], b""
        for line in lines:
            typer.echo(f"seed {self.seed}: {line.decode('utf-8', 'replace').rstrip()}", err=True)
        return bool(read)

    def go_on(self) -> int | None:
        """After the end of a recipe's output: start the next one, or say the exit code if there is none to start."""
        self.output.close()
        code = self.process.wait()
        if code or not self._waiting:
            return code if code >= 0 else 128 - code
        self._start()
        return None


def run(runs: Sequence[SeedRun], jobs: int) -> None:
    """Run what is not up to date. When a seed fails, the others go on; then its code is the exit code.

    Raises:
        SystemExit: seeds failed; the code is that of the first in order.
    """
    active: list[_Running] = []
    try:
        codes = _work(runs, jobs, active)
    except BaseException:
        for each in active:
            children.stop(each.process)
        raise
    failed = {each.seed: codes[each.seed] for each in runs if codes[each.seed]}
    if failed:
        names = ", ".join(f"{seed} (exit code {code})" for seed, code in failed.items())
        good = [str(each.seed) for each in runs if not codes[each.seed]]
        logger.error("failed seeds: %s; %s", names, _remedy(list(failed.values()), good))
        raise SystemExit(next(iter(failed.values())))


def _remedy(codes: Sequence[int], good: Sequence[str]) -> str:
    """What to do about seeds that failed with these codes, when `good` are done."""
    stopped = all(code == StoppedError.exit_code for code in codes)
    verdict = "the guard's verdict stands until the recipe or its data change"
    remedy = verdict if stopped else "run the same command again to continue"
    end = "," if len(good) == 1 else ""  # a number alone says how many seeds
    return f"{remedy}, or leave them out: --seeds {','.join(good)}{end}" if good else remedy


def _work(runs: Sequence[SeedRun], jobs: int, active: list[_Running]) -> dict[int, int]:
    """Until all have ended; the exit code of each seed. Those at work are in `active`."""
    environment = dict(os.environ)
    if jobs > 1:  # else the seeds would fight for the cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    waiting, codes = list(runs), {}
    with selectors.DefaultSelector() as selector:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(_Running(waiting.pop(0), environment))
                selector.register(active[-1].output, selectors.EVENT_READ, active[-1])
            for key, _ in selector.select():
                each: _Running = key.data
                if each.pass_on():
                    continue
                selector.unregister(each.output)
                code = each.go_on()
                if code is None:
                    selector.register(each.output, selectors.EVENT_READ, each)
                else:
                    codes[each.seed] = code
                    active.remove(each)
    return codes
