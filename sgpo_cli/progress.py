"""Progress of long work: one live line in a terminal, a plain log line now and then elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
LINE_SECONDS = 10.0
LIVE_SECONDS = 0.1


class RowProgress:
    """Rows done, tokens per second and time left.

    Args:
        what: the label, e.g. "gen-pairs".
        total: rows in all.
        done: rows that an earlier run has already finished.
        note: what else to show, such as the cost.
    """

    def __init__(self, what: str, total: int, done: int = 0, note: Callable[[], str] = lambda: "") -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._note = note
        self._tokens = 0
        self._shown = 0.0
        self._started = self._printed = time.monotonic()
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, rate="")

    def __enter__(self) -> Self:
        if self._before:
            logger.info("%s: continues at row %d of %d", self._what, self._before, self._total)
        self._bar.start()
        return self

    def reuse(self, rows: int) -> None:
        """Rows that turn out to be done already."""
        self._done += rows
        self._before += rows

    @property
    def done(self) -> int:
        return self._done

    @property
    def total(self) -> int:
        return self._total

    def advance(self, rows: int, tokens: int = 0) -> None:
        self._done += rows
        self._tokens += tokens
        now = time.monotonic()
        if now - self._shown < LIVE_SECONDS and self._done < self._total:
            return
        self._shown = now
        elapsed = max(now - self._started, 1e-9)
        rate = (self._done - self._before) / elapsed
        speed = f"{rate:,.0f} rows/s" if rate >= 100 else f"{rate:.3g} rows/s"
        speed += f", {self._tokens / elapsed:,.0f} tokens/s" if self._tokens else ""
        speed += self._note()
        self._bar.update(self._task, completed=self._done, rate=speed)
        if self._bar.disable and (now - self._printed > LINE_SECONDS or self._done == self._total):
            self._printed = now
            left = (self._total - self._done) / max(rate, 1e-9)
            logger.info("%s: %d/%d rows, %s, %.0f s left", self._what, self._done, self._total, speed, left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if error is not None and self._done < self._total:
            logger.warning(
                "%s: kept %d of %d rows; run the same command again to continue",
                self._what,
                self._done,
                self._total,
            )


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[name]`."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
