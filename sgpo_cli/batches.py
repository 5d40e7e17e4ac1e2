"""Work over rows in batches of fixed membership, so that a stopped run continues and ends the same.

Batch `n` holds rows `n*size` to `(n+1)*size` of the whole input, whatever is already done, and what is
random in a row is decided by the row's own seed. The outcome of a batch is journaled at once. On a CPU
that makes the output bytes of a run that was killed equal to those of one that was not.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from sgpo_cli.progress import RowProgress
from sgpo_cli.ranks import SharedWorkDone
from sgpo_cli.step import Outcome, Step

Row = dict[str, Any]
WAIT_SECONDS = 0.2


def derive_seed(seed: int, *parts: object) -> int:
    """A seed in [0, 2^63) for one piece of work, from the run's seed and the piece's name."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seeds_of(rows: Iterable[Row], seed: int, *parts: object) -> list[int]:
    """A seed per row for one purpose: it stays the row's own when the data set grows or is reordered."""
    return [derive_seed(seed, *parts, row["id"]) for row in rows]


@dataclass
class BatchResult:
    """One outcome per row of the batch, in order, and counts to add up (tokens, seconds)."""

    outcomes: list[Outcome]
    stats: dict[str, float] = field(default_factory=dict)


class Batches:
    """The journaled batches of one pass over the rows, shared among the ranks of a step.

    Args:
        do: makes the record of a batch: JSON, with `stats` to add up.
    """

    def __init__(self, step: Step, name: str, rows: int, size: int, do: Callable[[int], dict[str, Any]]) -> None:
        self._step, self._rows, self._size, self._do = step, rows, size, do
        self._journal = step.journal(name)

    @property
    def missing(self) -> list[int]:
        """The batches of this rank that are still to be done."""
        numbers = range(-(-self._rows // self._size))
        return [number for number in numbers if number not in self._journal and self._step.rank.owns(number)]

    def work(self, label: str) -> None:
        """Do this rank's share."""
        missing = self.missing
        share = sum(self._length(number) for number in missing)
        with RowProgress(label, self._rows, self._rows - share) as progress:
            for number in missing:
                stats = self._keep(number)["stats"]
                progress.advance(self._length(number), int(stats.get("completion_tokens", 0)))

    def record(self, number: int) -> dict[str, Any]:
        """A batch's record; one of another rank is waited for, and done here if that rank is not at work."""
        while number not in self._journal:
            works = self._step.works(self._step.rank.owner(number))
            self._journal.refresh()
            if number in self._journal:
                break
            if not works:
                return self._keep(number)
            time.sleep(WAIT_SECONDS)
        return self._journal.read(number)

    def _length(self, number: int) -> int:
        return min(self._size, self._rows - number * self._size)

    def _keep(self, number: int) -> dict[str, Any]:
        record = self._do(number)
        self._journal.append(number, record)
        return record

    def close(self) -> None:
        self._journal.close()


Work = Callable[[list[Row]], BatchResult]


class Outcomes(Iterable[Outcome]):
    """The outcomes of all rows in their order, read from the journal one batch at a time, as often as asked for."""

    def __init__(self, batches: Batches, count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Outcome]:
        for number in range(self._count):
            yield from self._batches.record(number)["rows"]


def run_batches(step: Step, rows: Sequence[Row], size: int, work: Work) -> tuple[Outcomes, dict[str, float]]:
    """Do what the journal does not hold yet, then give all outcomes in the order of the rows.

    Args:
        work: takes the rows of a batch; called once per missing batch.

    Returns:
        the outcomes, and the added-up stats.
    """
    batches = -(-len(rows) // size)

    def do(number: int) -> dict[str, Any]:
        batch = list(rows[number * size : (number + 1) * size])
        result = work(batch)
        if len(result.outcomes) != len(batch):
            raise AssertionError(f"batch {number}: {len(batch)} rows in, {len(result.outcomes)} out")
        return {"rows": result.outcomes, "stats": result.stats}

    with closing(Batches(step, "rank", len(rows), size, do)) as shared:
        shared.work(step.request.stage)
        if not step.rank.is_main:
            raise SharedWorkDone
        stats: dict[str, float] = {}
        for number in range(batches):
            for name, value in shared.record(number)["stats"].items():
                stats[name] = stats.get(name, 0) + value
    return Outcomes(shared, batches), {name: round(value, 3) for name, value in stats.items()}
