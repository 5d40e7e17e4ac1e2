"""From exceptions to what a person reads and what a script gets as exit code."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from sgpo_cli.devices import is_out_of_memory
from sgpo_cli.errors import ResourceError, SgpoError, UsageError

RANK_EXITS = "SGPO_EXITS"  # where the ranks of a launch leave their exit codes, see `children.run`
RESOURCE_ERRNOS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file size limit reached",
    errno.EIO: "disk error",
}
PATH_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


class Terminated(BaseException):
    """SIGTERM or SIGHUP: leave as after Ctrl-C, with every finished batch kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


@contextmanager
def mapped(*, debug: bool) -> Iterator[None]:
    """Run the block; print an error in two lines and exit with its code (the README has the table)."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _terminate)
    with _reported(), _explained(debug):
        yield


@contextmanager
def _explained(debug: bool) -> Iterator[None]:
    """Errors that a user can act on in two lines, and their exit codes."""
    try:
        yield
    except SgpoError as error:
        _leave(error, debug)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        _exit(130)
    except Terminated as stop:
        print("terminated; run the same command again to continue", file=sys.stderr)
        _exit(stop.exit_code)
    except MemoryError:
        _leave(ResourceError("out of memory", "lower --batch-size or --max-new-tokens"), debug)
    except OSError as error:
        if error.errno in RESOURCE_ERRNOS:
            what = RESOURCE_ERRNOS[error.errno] + (f" writing {error.filename}" if error.filename else "")
            _leave(ResourceError(what, "free some, then run the same command again"), debug)
        if error.errno not in PATH_ERRNOS or not error.filename:
            raise
        _leave(UsageError(f"{error.filename}: {error.strerror}", "check the path and its permissions"), debug)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        _leave(ResourceError(f"out of memory: {first}", "lower the batch size or the length"), debug)


@contextmanager
def _reported() -> Iterator[None]:
    """As a rank: leave a file when the block begins, and the time and exit code in it when it ends."""
    if RANK_EXITS not in os.environ:
        yield
        return
    path = Path(os.environ[RANK_EXITS]) / os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    _note(path, "")
    code = 1
    try:
        yield
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        raise
    finally:
        _note(path, f"{time.time_ns()} {code}")


def _note(path: Path, text: str) -> None:
    """Appears as a whole; who does not see the directory has nobody to report to."""
    with suppress(OSError):
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(text)
        temporary.replace(path)


def _leave(error: SgpoError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")  # of several processes, the main one needs no number
    print(f"error: {error}" if rank == "0" else f"error (process {rank}): {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    _exit(error.exit_code)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)
