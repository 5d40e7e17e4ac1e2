"""Several processes that generate or score for one step: which of them does what, by a rule and without a word.

Batch `n` belongs to rank `n mod count`. Each rank writes its own log; the first one waits for the others, does
what a lost one has left, and finishes the step. So it works under `torchrun`, `accelerate launch` and `srun`, and
in eight shells (`RANK=3 WORLD_SIZE=8 sgpo gen-pairs ...`), on machines that share nothing but a directory.
"""

import os
from dataclasses import dataclass

from sgpo_cli.errors import UsageError


@dataclass(frozen=True)
class Rank:
    """This process among those of its step."""

    number: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def owns(self, batch: int) -> bool:
        return batch % self.count == self.number

    def owner(self, batch: int) -> "Rank":
        return Rank(batch % self.count, self.count)


def this_rank() -> Rank:
    """By RANK and WORLD_SIZE (torchrun, accelerate), or by what `srun` sets.

    Raises:
        UsageError: they are no numbers, or name a process that cannot be.
    """
    if "WORLD_SIZE" in os.environ:
        return _rank("RANK", "WORLD_SIZE")
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return _rank("SLURM_PROCID", "SLURM_NTASKS")
    return Rank()


def _rank(number: str, count: str) -> Rank:
    given = os.environ.get(number, "0"), os.environ.get(count, "1")
    if not (given[0].isdecimal() and given[1].isdecimal() and int(given[0]) < int(given[1])):
        raise UsageError(
            f"environment: {number} is {given[0]!r} and {count} {given[1]!r}", "of N processes, the ranks are 0 to N-1"
        )
    return Rank(int(given[0]), int(given[1]))


class SharedWorkDone(Exception):
    """A helping rank has done its share; the main one does the rest."""
