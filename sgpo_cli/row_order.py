"""The order of rows in training with several processes: the same optimisation for any number of them.

TRL's trainers deal out batches of `per_device_train_batch_size` rows in turn, so with one global order and whole
global batches, an optimizer step sees the same rows on 1, 8 or 32 processes. What is missing for a whole last
batch is taken from the start of the epoch's order: every row is seen, fewer than one batch of them twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOTrainer, SFTTrainer

from sgpo_cli.errors import UsageError

STRATEGIES = ("random", "sequential", "group_by_length")


class GlobalBatches(Sampler[int]):
    """Indices of an epoch, in whole batches of `size` rows; seed and epoch decide, not the process.

    Args:
        lengths: tokens of each row.
        strategy: TRL's `train_sampling_strategy`.
    """

    def __init__(self, lengths: Sequence[int], size: int, strategy: str, seed: int) -> None:
        self._lengths, self._size, self._strategy, self._seed = lengths, size, strategy, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch, also when training resumes."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._size) * self._size

    def __iter__(self) -> Iterator[int]:
        dice = torch.Generator().manual_seed(self._seed + self._epoch)
        count = len(self._lengths)
        if self._strategy == "group_by_length":
            order = get_length_grouped_indices(self._lengths, self._size, generator=dice)
        elif self._strategy == "random":
            order = torch.randperm(count, generator=dice).tolist()
        else:
            order = list(range(count))
        return (order[place % count] for place in range(len(self)))


class _GlobalOrder:
    """Replaces the order of rows of one of TRL's trainers."""

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatches:
        args, rows = self.args, self.train_dataset  # type: ignore[attr-defined]
        if args.train_sampling_strategy not in STRATEGIES:
            raise UsageError(
                f"--train-sampling-strategy {args.train_sampling_strategy}: not with several processes or "
                "--global-batch-size",
                f"one of: {', '.join(STRATEGIES)}",
            )
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = rows["length"] if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]
        return GlobalBatches(list(lengths), size, args.train_sampling_strategy, args.seed)


class GlobalOrderSFTTrainer(_GlobalOrder, SFTTrainer):
    """SFT with the global order of rows."""


class GlobalOrderDPOTrainer(_GlobalOrder, DPOTrainer):
    """DPO with the global order of rows."""
