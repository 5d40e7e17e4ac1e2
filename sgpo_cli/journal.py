"""The append log of a running step: one checksummed JSON record a line, one writer per file.

A record is the outcome of one batch of fixed membership, so a record that is there is work that never
has to be done again. A torn last record is the normal trace of a killed process and is cut; damage
anywhere else is not normal and is refused. Knows nothing of stages or rows.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgpo_cli.errors import IntegrityError

SYNC_SECONDS = 1.0  # what a power cut can cost; a killed process loses nothing that was appended


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record, or None when the line is incomplete or its checksum does not fit."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


class Journal:
    """Append-only log of batch outcomes, readable by batch number.

    Args:
        directory: holds one file per rank; all of them are read, only `rank`'s is written.

    Raises:
        IntegrityError: a record before the last one of a file is damaged.
    """

    def __init__(self, directory: Path, rank: int = 0) -> None:
        directory.mkdir(exist_ok=True)
        self._path = directory / f"rank-{rank:04d}.jsonl"
        self._places: dict[int, tuple[Path, int]] = {}
        for path in sorted({*directory.glob("rank-*.jsonl"), self._path}):
            self._index(path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        self._synced = time.monotonic()

    def _index(self, path: Path) -> None:
        if not path.exists():
            return
        offset = 0
        with path.open("rb+" if path == self._path else "rb") as file:
            for line in file:
                record = _decode(line)
                if record is None:
                    if file.read(1):
                        raise IntegrityError(
                            f"{path}: damaged record at byte {offset}",
                            "restore the file, or run the step again with --fresh",
                        )
                    if path == self._path:
                        file.truncate(offset)
                    break
                self._places.setdefault(int(record["batch"]), (path, offset))
                offset += len(line)

    def __contains__(self, batch: int) -> bool:
        return batch in self._places

    def __len__(self) -> int:
        return len(self._places)

    def append(self, batch: int, record: dict[str, Any]) -> None:
        """Keep the outcome of `batch`; when this returns, it survives the death of the process."""
        data = _encode({"batch": batch, **record})
        written = 0
        while written < len(data):  # a nearly full disk takes a part first and raises on the next call
            try:
                written += os.write(self._file, data[written:])
            except OSError as error:
                error.filename = str(self._path)
                raise
        self._places[batch] = (self._path, self._size)
        self._size += len(data)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records in order of batch number, read from disk one at a time."""
        files = {path: path.open("rb") for path in {path for path, _ in self._places.values()}}
        try:
            for batch in sorted(self._places):
                path, offset = self._places[batch]
                files[path].seek(offset)
                record = _decode(files[path].readline())
                if record is None:
                    raise IntegrityError(f"{path}: record at byte {offset} changed while it was in use")
                yield record
        finally:
            for file in files.values():
                file.close()

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)
