"""What a training step would do and need: rows, memory per GPU for each method, time. Nothing is loaded or written."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig

from sgpo_cli import launch, memory, row_checks, training
from sgpo_cli.memory import GIB, Load, Shape
from sgpo_cli.options import TrainConfig
from sgpo_cli.start_model import HALF

CARDS = (16, 24, 40, 48, 80, 141)  # GiB
PEAK = {  # dense bf16 operations per second, from the makers' data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}
USE = 0.4  # share of the peak that a training of this kind reaches; an assumption
SHARDS = 8


def plan(config: TrainConfig, rows: Sequence[dict[str, Any]], rejected: Mapping[str, int]) -> Iterator[str]:
    """Lines to print.

    Raises:
        UsageError: as the step itself would, for options and rows.
    """
    job = training.prepare(config, Path(config.output_dir))
    tokens = list(row_checks.tokenize(job.counting, rows, job.ends, config.chat_template_kwargs))
    lengths, _ = training.check(job, tokens)
    shape = Shape.of(job.start.base, job.start.revision if job.start.adapter is None else "main")
    load = _load(job, lengths.longest)
    limit = job.args.max_length or lengths.longest
    pairs = 2 if isinstance(job.args, DPOConfig) else 1
    epoch = pairs * sum(min(row.total, limit) for row in tokens)
    yield (
        f"{job.start.base}: {shape.parameters / 1e9:.2f} B parameters, {shape.layers} layers, "
        f"{str(job.start.dtype).removeprefix('torch.')}"
    )
    dropped = f" ({sum(rejected.values())} rejected)" if rejected else ""
    yield f"{lengths.rows} rows{dropped}, {epoch:,} tokens an epoch; {lengths}"
    world, args = launch.world_size(), job.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    yield (
        f"{step} rows per optimizer step: {args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} accumulated x {world} processes"
    )
    yield from _memory(job, shape, load)
    steps = math.ceil((lengths.rows - lengths.dropped) / step)
    yield from _time(job, shape, load, epoch, steps)


def _load(job: training.Job, longest: int) -> Load:
    args = job.args
    pairs = isinstance(args, DPOConfig)
    return Load(
        sequences=args.per_device_train_batch_size * (2 if pairs else 1),
        tokens=min(longest, args.max_length or longest),
        # Without a GPU this is a plan for one, where it is the default.
        checkpointing=bool(args.activation_checkpointing) or not torch.cuda.is_available(),
        reference=isinstance(args, DPOConfig) and not args.precompute_ref_log_probs,
        half_weights=job.start.dtype in HALF,
        rank=job.model_args.lora_r or 16,
        dropout=bool(job.model_args.lora_dropout) and not getattr(args, "disable_dropout", False),
    )


def _memory(job: training.Job, shape: Shape, load: Load) -> Iterator[str]:
    yield f"memory per GPU, estimated   {'alone':>12}   {f'over {SHARDS}, sharded':>18}"
    for method, name in (("full", "full"), ("lora", f"LoRA r {load.rank}"), ("qlora", f"QLoRA r {load.rank}")):
        alone = memory.total_bytes(shape, method, load) / GIB
        sharded = memory.total_bytes(shape, method, load, SHARDS) / GIB
        both = f"{alone:>8.1f} GiB   " + (f"{sharded:>14.1f} GiB" if method != "qlora" else f"{'not sharded':>18}")
        chosen = "  <- this step" if method == job.method.name else ""
        yield f"  {name:<24}{both}   {_fits(alone, sharded if method != 'qlora' else None)}{chosen}"
    activations = memory.activation_bytes(shape, job.method.name, load) / GIB
    how = "with" if load.checkpointing else "without"
    yield (
        f"  of it {activations:.1f} GiB beside weights, gradients and optimizer, for {load.sequences} sequences of "
        f"{load.tokens} tokens, {how} activation checkpointing"
    )


def _fits(alone: float, sharded: float | None) -> str:
    """The smallest usual card that holds it, alone or sharded."""
    card = next((card for card in CARDS if alone < card), None)
    if card is not None:
        return f"fits on {card} GB"
    each = next((card for card in CARDS if sharded is not None and sharded < card), None)
    return f"fits on {SHARDS} x {each} GB" if each else "fits nowhere so"


def _time(job: training.Job, shape: Shape, load: Load, epoch: int, steps: int) -> Iterator[str]:
    """Of an epoch of so many tokens and optimizer steps."""
    args = job.args
    epochs, length = args.num_train_epochs, f"{args.num_train_epochs:g} epochs"
    if args.max_steps > 0:
        epochs, length = args.max_steps / steps, f"{args.max_steps} steps"
    once = isinstance(args, DPOConfig) and bool(args.precompute_ref_log_probs)
    with_reference = Load(**{**vars(load), "reference": isinstance(args, DPOConfig)})
    flops = memory.training_flops(shape, job.method.name, with_reference, epoch, epochs, once=once)
    name, peak = _device()
    world = launch.world_size()
    seconds = flops / (peak * USE * world)
    yield (
        f"time: {length} are {flops:.2g} operations, about {_span(seconds)} on {world} x "
        f"{name} at an assumed {USE:.0%} of {peak / 1e12:.3g} TFLOP/s"
    )


def _device() -> tuple[str, float]:
    """The accelerator and its peak; without one, this processor as measured."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return name, next((peak for card, peak in PEAK.items() if card in name), PEAK["A100"])
    return "this CPU", _cpu_peak()


def _cpu_peak(size: int = 512) -> float:
    """Operations per second of a matrix product on this machine, the best of some."""
    matrix = torch.ones(size, size)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _span(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
