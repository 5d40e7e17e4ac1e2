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

from sgpo_cli import pipeline, recipe
from sgpo_cli.errors import UsageError

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


class _Running:
    """One seed at work: its recipes, one process after the other."""

    def __init__(self, run: SeedRun, environment: dict[str, str]) -> None:
        self.run = run
        self._environment = environment
        self._waiting = list(run.books)
        self._rest = b""
        self.process: subprocess.Popen[bytes] | None = None

    def start_next(self) -> IO[bytes] | None:
        """Start the next recipe; its output, or None if there is none left."""
        if not self._waiting:
            return None
        book = self._waiting.pop(0)
        command = [sys.executable, "-m", "sgpo_cli", "run", str(book.path), *book.overrides]
        self.process = subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=pipeline.end_with_parent("sgpo run"),
        )
        return self.process.stdout

    def pass_on(self, output: IO[bytes]) -> bool:
        """Print whole lines with the seed before them; False at the end of the output."""
        read = os.read(output.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + read).split(b"\n")
        if not read and self._rest:
            lines, self._rest = [self._rest], b""
        for line in lines:
            typer.echo(f"seed {self.run.seed}: {line.decode('utf-8', 'replace').rstrip()}", err=True)
        return bool(read)


def run(runs: Sequence[SeedRun], jobs: int) -> None:
    """Run what is not up to date. When a seed fails, the others go on; then its code is the exit code.

    Raises:
        SystemExit: seeds failed; the code is that of the first in order.
    """
    environment = dict(os.environ)
    if jobs > 1:  # else the seeds would fight for the cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    codes: dict[int, int] = {}
    active: list[_Running] = []
    try:
        with selectors.DefaultSelector() as selector:
            _work(runs, jobs, environment, active, codes, selector)
    except BaseException:
        for each in active:
            if each.process:
                pipeline.stop(each.process)
        raise
    failed = {each.seed: codes[each.seed] for each in runs if codes[each.seed]}
    if failed:
        names = ", ".join(f"{seed} (exit code {code})" for seed, code in failed.items())
        good = "".join(f"{each.seed}," for each in runs if not codes[each.seed])
        without = f", or leave them out: --seeds {good}" if good else ""
        logger.error("failed seeds: %s; run the same command again to continue%s", names, without)
        raise SystemExit(next(iter(failed.values())))


def _work(
    runs: Sequence[SeedRun],
    jobs: int,
    environment: dict[str, str],
    active: list[_Running],
    codes: dict[int, int],
    selector: selectors.BaseSelector,
) -> None:
    """Until every seed has its exit code in `codes`; those at work are in `active`."""
    waiting = list(runs)
    while waiting or active:
        while waiting and len(active) < jobs:
            each = _Running(waiting.pop(0), environment)
            active.append(each)
            output = each.start_next()
            assert output is not None
            selector.register(output, selectors.EVENT_READ, each)
        for key, _ in selector.select():
            each, output = key.data, key.fileobj
            if each.pass_on(output):
                continue
            selector.unregister(output)
            output.close()
            code = each.process.wait()
            following = each.start_next() if code == 0 else None
            if following is not None:
                selector.register(following, selectors.EVENT_READ, each)
                continue
            codes[each.run.seed] = code if code >= 0 else 128 - code
            active.remove(each)
