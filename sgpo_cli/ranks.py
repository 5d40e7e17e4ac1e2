"""Several processes that generate or score for one step: which of them does what, by a rule and without a word.

Batch `n` belongs to rank `n mod count`. Each rank writes its own log; the first one waits for the others, does
what a lost one has left, and finishes the step. So it works under `torchrun`, `accelerate launch` and `srun`, and
in eight shells (`RANK=3 WORLD_SIZE=8 sgpo gen-pairs ...`), on machines that share nothing but a directory.
"""

import os
from dataclasses import dataclass


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
    """By RANK and WORLD_SIZE (torchrun, accelerate), or by what `srun` sets."""
    if "WORLD_SIZE" in os.environ:
        return Rank(int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"]))
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return Rank(int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_NTASKS", "1")))
    return Rank()


class SharedWorkDone(Exception):
    """A helping rank has done its share; the main one does the rest."""
