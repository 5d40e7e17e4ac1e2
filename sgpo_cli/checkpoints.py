"""Checkpoints that can be trusted: sealed when complete, saved when a scheduler ends the job.

Only sealed ones are resumed from. Trainers write checkpoints file by file and resume from the highest number; one
without optimizer or scheduler state resumes without a word and gives other weights.
"""

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sgpo_cli import launch
from sgpo_cli.artifacts import sha256_file, sync_directory, write_atomically
from sgpo_cli.errors import StaleError
from sgpo_cli.exits import Terminated

logger = logging.getLogger(__name__)
SEAL = "sgpo_seal.json"


def seal(checkpoint: Path) -> None:
    """Record the digests of a complete checkpoint, after all of it has reached the disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(checkpoint)
    digests = {str(path.relative_to(checkpoint)): sha256_file(path) for path in files}
    write_atomically(checkpoint / SEAL, json.dumps(digests, indent=2) + "\n")


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint is sealed and every file is what the seal says."""
    try:
        digests = json.loads((checkpoint / SEAL).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(digests, dict) and all(
        (checkpoint / name).is_file() and sha256_file(checkpoint / name) == digest for name, digest in digests.items()
    )


def newest_whole(directory: Path) -> Path | None:
    """The checkpoint to resume from; unusable newer ones are removed, with a message.

    Raises:
        StaleError: it was made by another number of processes, whose random states do not fit.
    """
    found = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(checkpoint):
            _refuse_other_world(checkpoint)
            return checkpoint
        logger.warning("%s: incomplete or damaged, removed; an earlier checkpoint is used", checkpoint)
        shutil.rmtree(checkpoint)
    if found:
        logger.warning("%s: no checkpoint is whole, training starts over", directory)
    return None


def tokens_trained_on(checkpoint: Path) -> int:
    """How many tokens the training had seen when it wrote the checkpoint."""
    history = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["log_history"]
    return max((int(entry["num_tokens"]) for entry in history if "num_tokens" in entry), default=0)


def _refuse_other_world(checkpoint: Path) -> None:
    made_by = len(list(checkpoint.glob("rng_state*.pth")))
    if made_by and made_by != launch.world_size():
        raise StaleError(
            f"{checkpoint} was made by {made_by} processes, these are {launch.world_size()}",
            f"launch {made_by}, or pass --fresh to start over",
        )


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint when every process has written its part."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        launch.wait()
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        launch.wait()


class LogBeforeSave(TrainerCallback):
    """Ends the logging interval at each checkpoint.

    Trainers log means since the last line, and a checkpoint does not hold what has come in since: the first line of
    a run that continues would be the mean of fewer steps than that of a run that was never stopped.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class SaveWhenTerminated(TrainerCallback):
    """After SIGTERM, with which Slurm announces that a job will end: a checkpoint, then no further step.

    A second SIGTERM ends at once. Processes hear the signal at different steps, so they agree on one.
    """

    def __init__(self) -> None:
        self._heard = False
        self._before: Any = signal.SIG_DFL

    def _hear(self, signum: int, frame: Any) -> None:
        if self._heard:
            raise Terminated(signum)
        self._heard = True
        logger.warning("SIGTERM: saves a checkpoint after this step, then leaves")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = signal.signal(signal.SIGTERM, self._hear)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if launch.world_size() > 1:
            heard = torch.tensor(float(self._heard), device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self._heard = bool(heard.item())
        if self._heard:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self._heard:
            raise Terminated(signal.SIGTERM)
