"""Checkpoints that can be trusted: sealed when complete, and only sealed ones are resumed from.

Trainers write checkpoints file by file and resume from the highest number; one without optimizer or
scheduler state resumes without a word and gives other weights.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sgpo_cli.artifacts import sha256_file, sync_directory, write_atomically

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
    """The checkpoint to resume from; unusable newer ones are removed, with a message."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning("%s: incomplete or damaged, removed; an earlier checkpoint is used", checkpoint)
        shutil.rmtree(checkpoint)
    return None


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint when the trainer has written it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
