"""Several processes for one training step: which of them writes, what is refused, and one for each GPU."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import DPOConfig, SFTConfig

from sgpo_cli import children
from sgpo_cli.errors import UsageError

logger = logging.getLogger(__name__)


def world_size() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that locks and writes the step."""
    return os.environ.get("RANK", "0") == "0"


def wait() -> None:
    """Until all processes have come here."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


def agreed(value: Any) -> Any:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


def use_all_gpus() -> None:
    """Start again with a process for each visible GPU, unless a launcher has done so; TRL needs one each.

    Raises:
        SystemExit: they have ended; with the exit code that says what became of them.
    """
    if world_size() > 1:
        _end_with_launcher()
    gpus = torch.cuda.device_count()
    if gpus < 2 or "WORLD_SIZE" in os.environ:
        return
    command = [*_launcher(gpus), "-m", "sgpo_cli", *sys.argv[1:]]
    logger.info("%d GPUs are visible: starting a process for each (%s)", gpus, " ".join(command[1:]))
    with tempfile.TemporaryDirectory() as directory:
        code = children.run(command, Path(directory) / "ranks")
    raise SystemExit(code if code >= 0 else 128 - code)


def _launcher(processes: int) -> list[str]:
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        *plain,
    ]


def _end_with_launcher() -> None:
    """A launcher that was killed must not leave ranks behind that hold the lock."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def accumulation_steps(global_batch: int, per_device: int) -> int:
    """How many batches make an optimizer step, so that each step sees `global_batch` rows.

    Raises:
        UsageError: it cannot be divided that way.
    """
    together = per_device * world_size()
    if global_batch % together:
        raise UsageError(
            f"--global-batch-size {global_batch} is no multiple of {together} "
            f"(per_device_train_batch_size {per_device} x {world_size()} processes)",
            "choose another per_device_train_batch_size",
        )
    return global_batch // together


def is_sharded(args: SFTConfig | DPOConfig) -> bool:
    """Whether the weights are spread over the processes (FSDP, ZeRO-3)."""
    plugin = args.deepspeed_plugin
    return (
        bool(args.fsdp)
        or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        or (plugin is not None and plugin.zero_stage == 3)
    )


def refuse_bad_states(args: SFTConfig | DPOConfig, method: str) -> None:
    """Launches that would run to their end and give something else than they say.

    Raises:
        UsageError: each process takes itself for the only one, or quantised weights would be sharded.
    """
    if args.world_size != world_size():
        raise UsageError(
            f"the launcher started {world_size()} processes, but each takes itself for one of {args.world_size}; "
            "all of them would train alone and write the same files",
            "start without a launcher, or with one for the devices that this machine has",
        )
    if method == "qlora" and is_sharded(args):
        raise UsageError(
            "4- and 8-bit weights cannot be sharded (FSDP, ZeRO-3)",
            "use plain data parallelism (recipes/launch/ddp.yaml): each GPU holds the small base model",
        )
