"""The append log of a running step: one checksummed JSON record a line, one writer per file.

A record that is there is work that never has to be done again. A torn last record is the normal trace of a
killed process and is cut; damage anywhere else is not normal and is refused. Knows nothing of stages or rows.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgpo_cli.errors import IntegrityError

SYNC_SECONDS = 1.0  # what a power cut can cost; a killed process loses nothing that was appended
Place = tuple[Path, int]


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(line: bytes) -> dict[str, Any] | None:
    """The record, or None when the line is incomplete or its checksum does not fit."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def read_records(
    path: Path, *, mend: bool, start: int = 0, damaged: Callable[[str], None] | None = None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The records of a file, each with the bytes where it begins and ends.

    Args:
        mend: cut a torn last record off; otherwise it is only passed over, another process may be writing.
        start: where a record begins.
        damaged: told of damaged records, which are then passed over.

    Raises:
        IntegrityError: a record before the last one is damaged.
    """
    offset = start
    with path.open("rb+" if mend else "rb") as file:
        file.seek(start)
        for line in file:
            if not mend and not line.endswith(b"\n"):
                break
            record = decode(line)
            if record is None:
                if damaged and line.endswith(b"\n"):
                    damaged(f"{path}: record at byte {offset}")
                    offset += len(line)
                    continue
                if file.read(1):
                    raise IntegrityError(
                        f"{path}: damaged record at byte {offset}",
                        "restore the file, or run the step again with --fresh",
                    )
                if mend:
                    file.truncate(offset)
                break
            yield offset, offset + len(line), record
            offset += len(line)


class Log:
    """A file to append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> int:
        """Keep a record; when this returns, it survives the death of the process. Returns where it starts."""
        data, start = _encode(record), self._size
        written = 0
        while written < len(data):  # a nearly full disk takes a part first and raises on the next call
            try:
                written += os.write(self._file, data[written:])
            except OSError as error:
                error.filename = str(self.path)
                raise
        self._size += len(data)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()
        return start

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


class Journal:
    """Outcomes of batches by batch number.

    Args:
        directory: holds one file per rank; all of them are read, only `rank`'s is written.
        name: of the pass over the rows, where a step makes several.

    Raises:
        IntegrityError: a record before the last one of a file is damaged.
    """

    def __init__(self, directory: Path, rank: int = 0, name: str = "rank") -> None:
        directory.mkdir(exist_ok=True)
        path = directory / f"{name}-{rank:04d}.jsonl"
        self._pattern, self._directory = f"{name}-*.jsonl", directory
        self._places: dict[int, Place] = {}
        self._read_to: dict[Path, int] = {}
        path.touch()
        for _ in read_records(path, mend=True):
            pass
        self.refresh()
        self._log = Log(path)

    def refresh(self) -> None:
        """Take note of what other ranks have written meanwhile."""
        for path in sorted(self._directory.glob(self._pattern)):
            for begin, end, record in read_records(path, mend=False, start=self._read_to.get(path, 0)):
                self._places.setdefault(int(record["batch"]), (path, begin))
                self._read_to[path] = end

    def __contains__(self, batch: int) -> bool:
        return batch in self._places

    def __len__(self) -> int:
        return len(self._places)

    def append(self, batch: int, record: dict[str, Any]) -> None:
        """Keep the outcome of `batch`; when this returns, it survives the death of the process."""
        self._places[batch] = (self._log.path, self._log.append({"batch": batch, **record}))

    def read(self, batch: int) -> dict[str, Any]:
        """The record of one batch."""
        return read_at(*self._places[batch])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records in order of batch number, read from disk one at a time."""
        return map(self.read, sorted(self._places))

    def close(self) -> None:
        self._log.close()


def read_at(path: Path, offset: int) -> dict[str, Any]:
    """The record that starts at `offset`.

    Raises:
        IntegrityError: it is no longer there.
    """
    with path.open("rb") as file:
        file.seek(offset)
        record = decode(file.readline())
    if record is None:
        raise IntegrityError(f"{path}: record at byte {offset} changed while it was in use")
    return record
