"""Steps as child processes: they do not outlive who started them, and a launcher's ranks say how they ended.

Launchers (torchrun, accelerate, srun) exit with 1 whatever happened to a rank. So each rank leaves its exit code in
a directory, and what counts is: an error that a rank reports by a code of its own, else a rank that was lost.
"""

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sgpo_cli.errors import ResourceError
from sgpo_cli.exits import RANK_EXITS

logger = logging.getLogger(__name__)
STOPPED = (130, 143)


def run(command: Sequence[str], exits: Path | None = None) -> int:
    """Run a command to its end; returns its exit code, negative if a signal killed it.

    Args:
        exits: the command is a launcher, whose ranks report here; must be seen by all of its machines.
    """
    if exits is not None:
        shutil.rmtree(exits, ignore_errors=True)
        exits.mkdir(parents=True)
    environment = os.environ | ({RANK_EXITS: str(exits.resolve())} if exits else {})
    process = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent(exits is not None))
    try:
        code = process.wait()
    except BaseException:
        stop(process)
        raise
    finally:
        found = _reported(exits) if exits else {}
        if exits is not None:
            shutil.rmtree(exits, ignore_errors=True)
    return _cause(found, code) if code > 0 and found else code


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to leave; after Ctrl-C in a terminal it is on its way already."""
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def end_with_parent(is_launcher: bool) -> Callable[[], Any] | None:
    """A step must not outlive a process that was killed: it would hold the lock against the next one."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig = 1
    # A launcher gets the chance to stop its ranks.
    end = signal.SIGTERM if is_launcher else signal.SIGKILL
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(pr_set_pdeathsig, end)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _reported(exits: Path) -> dict[int, list[int]]:
    """By rank: the time it ended, in nanoseconds, and its code; nothing of one that only started."""
    files = {int(path.name): path.read_text().split() for path in exits.glob("[0-9]*")}
    return {rank: [int(word) for word in words] for rank, words in sorted(files.items())}


def _cause(found: dict[int, list[int]], code: int) -> int:
    """The exit code of a launch that failed.

    A rank that hears of a lost one raises too, so a code of 1 says less than a rank that left none.
    """
    ended = sorted(words for words in found.values() if words)
    own = [each for _, each in ended if each not in (0, 1, *STOPPED)]
    if own:
        return own[0]
    lost = [rank for rank, words in found.items() if not words]
    if lost:
        names = ", ".join(map(str, lost))
        logger.error("error: of %d processes, these were lost (killed or crashed): %s", len(found), names)
        logger.error("hint: the launcher's lines above name the signal; SIGKILL often means that memory ran out")
        return ResourceError.exit_code
    return code if any(each == 1 for _, each in ended) else max((each for _, each in ended), default=code)
