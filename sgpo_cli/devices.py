"""Which GPUs belong to one of several processes on the same machine, and how a device says that it is full."""

from sgpo_cli.errors import UsageError


def own_devices(visible: str, local_rank: int, count: int) -> str:
    """The GPUs of one rank, out of those that all ranks of the machine see.

    Args:
        visible: a list as in CUDA_VISIBLE_DEVICES. One of just `count` entries is the rank's own already.
        count: how many GPUs each rank uses.

    Raises:
        UsageError: there are too few for this rank.
    """
    devices = visible.split(",")
    if len(devices) == count:
        return visible
    own = devices[local_rank * count : (local_rank + 1) * count]
    if len(own) < count:
        raise UsageError(
            f"local rank {local_rank} needs {count} GPUs of its own, and the machine's ranks see {len(devices)}",
            "start fewer ranks, or use fewer GPUs for each (tensor_parallel_size)",
        )
    return ",".join(own)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no: torch's on a GPU, and on a CPU torch's, C++'s or Python's."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    )
