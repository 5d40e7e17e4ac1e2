"""Work over rows in batches of fixed membership, so that a stopped run continues and ends the same.

Batch `n` holds rows `n*size` to `(n+1)*size` of the whole input, whatever is already done, and what is
random in a row is decided by the row's own seed. The outcome of a batch is journaled at once. On a CPU
that makes the output bytes of a run that was killed equal to those of one that was not.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from sgpo_cli.progress import RowProgress
from sgpo_cli.step import Outcome, Step

Row = dict[str, Any]


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


Work = Callable[[list[Row]], BatchResult]


def run_batches(step: Step, rows: Sequence[Row], size: int, work: Work) -> tuple[Iterator[Outcome], dict[str, float]]:
    """Do what the journal does not hold yet, then give all outcomes in the order of the rows.

    Args:
        work: takes the rows of a batch; called once per missing batch.

    Returns:
        the outcomes, read from the journal one batch at a time, and the added-up stats.
    """
    batches = -(-len(rows) // size)
    with closing(step.journal()) as journal:
        done = sum(min(size, len(rows) - number * size) for number in range(batches) if number in journal)
        with RowProgress(step.request.stage, len(rows), done) as progress:
            for number in range(batches):
                if number in journal:
                    continue
                batch = list(rows[number * size : (number + 1) * size])
                result = work(batch)
                if len(result.outcomes) != len(batch):
                    raise AssertionError(f"batch {number}: {len(batch)} rows in, {len(result.outcomes)} out")
                journal.append(number, {"rows": result.outcomes, "stats": result.stats})
                progress.advance(len(batch), int(result.stats.get("completion_tokens", 0)))
        stats: dict[str, float] = {}
        for record in journal:
            for name, value in record["stats"].items():
                stats[name] = stats.get(name, 0) + value
    rounded = {name: round(value, 3) for name, value in stats.items()}
    return ((row, reason) for record in journal for row, reason in record["rows"]), rounded
