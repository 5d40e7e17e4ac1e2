"""The order of rows in training: the same for any number of processes, and for a run that was stopped.

TRL's trainers deal out batches of `per_device_train_batch_size` rows in turn, so with one global order and whole
global batches, an optimizer step sees the same rows on 1, 8 or 32 processes. What is missing for a whole last
batch is taken from the start of the epoch's order: every row is seen, fewer than one batch of them twice.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from trl import DPOTrainer, SFTTrainer

from sgpo_cli.errors import UsageError

STRATEGIES = ("random", "sequential", "group_by_length")
ORDER = "row_order.json"


class SeededOrder(Sampler[int]):
    """Indices of an epoch; seed and epoch decide, not the process or what it did before.

    Args:
        lengths: tokens of each row.
        size: rows of an optimizer step, over all processes.
        strategy: TRL's `train_sampling_strategy`.
        epoch: the number of the epoch that begins. Asked for, because accelerate (1.15) does not tell the sampler
            of several processes when training continues within an epoch.
        whole: fill the last batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        strategy: str,
        seed: int,
        epoch: Callable[[], int],
        *,
        whole: bool = True,
    ) -> None:
        self._lengths, self._size, self._strategy, self._seed = lengths, size, strategy, seed
        self._epoch = epoch
        self._count = -(-len(lengths) // size) * size if whole else len(lengths)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        dice = torch.Generator().manual_seed(self._seed + self._epoch())
        rows = len(self._lengths)
        if self._strategy == "group_by_length":
            order = get_length_grouped_indices(self._lengths, self._size, generator=dice)
        elif self._strategy == "random":
            order = torch.randperm(rows, generator=dice).tolist()
        else:
            order = list(range(rows))
        return (order[place % rows] for place in range(self._count))


class _SeededOrder:
    """Replaces the order of rows of one of TRL's trainers."""

    whole_batches = True

    def _get_train_sampler(self, train_dataset: Any = None) -> SeededOrder:
        args, rows = self.args, self.train_dataset  # type: ignore[attr-defined]
        if args.train_sampling_strategy not in STRATEGIES:
            raise UsageError(
                f"--train-sampling-strategy {args.train_sampling_strategy}: not with several processes or "
                "--global-batch-size",
                f"one of: {', '.join(STRATEGIES)}",
            )
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = rows["length"] if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]
        strategy = args.train_sampling_strategy
        return SeededOrder(list(lengths), size, strategy, args.seed, self._epoch, whole=self.whole_batches)

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)  # type: ignore[attr-defined]


class GlobalSFTTrainer(_SeededOrder, SFTTrainer):
    """SFT in whole global batches."""


class GlobalDPOTrainer(_SeededOrder, DPOTrainer):
    """DPO in whole global batches."""


class GroupedDPOTrainer(_SeededOrder, DPOTrainer):
    """DPO by one process with pairs grouped by length; TRL has no lengths of them."""

    whole_batches = False


class _KeptOrder(Sampler[int]):
    """An order that is drawn from the global random state, or the one that a checkpoint holds for its epoch."""

    def __init__(self, drawn: Sampler[int], kept: list[int] | None) -> None:
        self._drawn, self._kept = drawn, kept
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self._drawn)  # type: ignore[arg-type]  # every sampler of a map-style data set has a length

    def __iter__(self) -> Iterator[int]:
        self.order = list(self._drawn) if self._kept is None else self._kept
        self._kept = None
        return iter(self.order)


class GroupedSFTTrainer(SFTTrainer):
    """SFT by one process with rows grouped by length.

    TRL draws that order from the global random state; one that continued within an epoch after the first would
    draw another, see some rows twice and others never.
    """

    _resumed: Path | None = None
    _kept_order: _KeptOrder | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        self._resumed = Path(checkpoint) / ORDER if checkpoint else None
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        kept = json.loads(self._resumed.read_text()) if self._resumed and self._resumed.exists() else None
        self._kept_order = _KeptOrder(sampler, kept)
        return self._kept_order

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        within_an_epoch = float(self.state.epoch or 0) % 1 > 0
        if self._kept_order is not None and within_an_epoch:
            (Path(output_dir) / ORDER).write_text(json.dumps(self._kept_order.order))
