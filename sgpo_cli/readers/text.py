"""Text files to raw records: bytes, strict UTF-8, strict JSON or RFC 4180 CSV, one record at a time.

A reader knows where each record lies and what it says, not what its columns mean (`schema.py`) nor what
becomes of bad ones (`rows.py`). Only byte offsets are kept, and records are decoded on access, so a million
rows cost 24 MB however long they are.
"""

import csv
import os
import re
import stat
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from sgpo_cli.errors import IntegrityError, UsageError
from sgpo_cli.readers.strict import Fault, printable, shown, strict_json

MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
BOM = b"\xef\xbb\xbf"
BOM_NOTE = "the byte order mark at the start of the file is skipped"
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


class Records(ABC):
    """The raw records of one source, decoded one at a time; `notes` tell what was quietly put right."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> dict[str, Any]:
        """The record, or the Fault that makes it unusable."""

    def where(self, index: int) -> str:
        return f"{printable(self.name)}:{index + 1}"


class OpenFile:
    """A regular file that notices when it changes after it was first looked at."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"{printable(path)}: cannot be read: {error.strerror}") from error
        # The files of a data set outlive any with-block: they are read until the rows are forgotten.
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = _stamp(os.fstat(self._descriptor))
        if not regular:
            raise UsageError(f"{printable(path)}: is not a regular file", "copy its content to a file first")
        if not self._stamp[0]:
            raise UsageError(f"{printable(path)}: the file is empty", "a data file needs at least one row")

    def check(self) -> None:
        try:
            if _stamp(os.stat(self.path)) == self._stamp:
                return
        except OSError:
            pass
        raise IntegrityError(
            f"{printable(self.path)}: the file changed while it was being used",
            "run the same command again, and let no other program write to the file meanwhile",
        )

    def stream(self) -> BufferedReader:
        return open(self._descriptor, "rb", closefd=False)

    def slice(self, offset: int, length: int) -> bytes:
        self.check()
        # pread shares no position, so threads and forked workers may read through one descriptor.
        return os.pread(self._descriptor, length, offset)


class TextFile(Records):
    """A file of text records, known by their byte offsets; lines end at b"\\n" and nowhere else."""

    quoted = False

    def __init__(self, path: str, limit: int | None, max_bytes: int) -> None:
        super().__init__(path)
        self._max_bytes = max_bytes
        self._offsets, self._lengths, self._lines = array("Q"), array("Q"), array("Q")
        self._file = OpenFile(path)
        with self._file.stream() as stream:
            head = stream.read(8)
            for magic, kind in MAGIC.items():
                if head.startswith(magic):
                    raise UsageError(f"{printable(path)}: is {kind}, not UTF-8 text", "convert or unpack it first")
            if head.startswith(BOM):
                self.notes.append(BOM_NOTE)
            stream.seek(len(BOM) if head.startswith(BOM) else 0)
            self._index(stream, limit)
        self._file.check()

    def _index(self, stream: BufferedReader, limit: int | None) -> None:
        """Find the records: the lines that are not blank, joined (in CSV) while a quote is open."""
        start = first = size = quotes = 0
        for number, offset, length, text in _lines(stream, self._max_bytes):
            if not quotes % 2:
                if text.isspace():
                    continue
                if len(self._offsets) == limit:
                    return
                start, first, quotes = offset, number, 0
            quotes += text.count(b'"') if self.quoted else 0
            size = offset + length - start
            # A quote that is left open must not swallow the rest of the file.
            if size > self._max_bytes:
                quotes = 0
            if not quotes % 2:
                self._append(start, size, first)
        if quotes % 2:
            self._append(start, size, first)

    def _append(self, offset: int, length: int, line: int) -> None:
        self._offsets.append(offset)
        self._lengths.append(length)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        return f"{printable(self.name)}:{self._lines[index]}"

    def text(self, index: int) -> str:
        """The record as text, with its line ending."""
        offset, length = self._offsets[index], self._lengths[index]
        if length > self._max_bytes:
            raise Fault("too_long", f"the row has {length} bytes, at most {self._max_bytes} are allowed")
        raw = self._file.slice(offset, length)
        if found := CONTROL.search(raw):
            reason = "nul_byte" if found[0] == b"\0" else "control_character"
            raise Fault(reason, f"control character {found[0][0]:#04x} at byte {offset + found.start()} of the file")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            at = offset + error.start
            raise Fault("not_utf8", f"not UTF-8 at byte {at} of the file ({error.reason})") from None


class JsonLines(TextFile):
    """One JSON object a line."""

    def __init__(self, path: str, limit: int | None, max_bytes: int) -> None:
        super().__init__(path, limit, max_bytes)
        if len(self) and self._file.slice(self._offsets[0], 64).lstrip().startswith(b"["):
            raise UsageError(
                f"{self.where(0)}: a JSON array, where one object a line is expected",
                "write one object a line, or name the file .json if it is one array",
            )

    def read(self, index: int) -> dict[str, Any]:
        text = self.text(index)
        try:
            return as_record(strict_json(text))
        except Fault as fault:
            if fault.reason == "bad_json" and index == len(self) - 1 and not text.endswith("\n"):
                raise Fault("torn_line", f"the last line is cut off: {fault.message}") from None
            raise


class Csv(TextFile):
    """RFC 4180: a header, commas, double quotes doubled inside quotes. Every value is a string."""

    quoted = True

    def __init__(self, path: str, limit: int | None, max_bytes: int) -> None:
        # The csv module's own limit, 128 KiB a field, is a global; the limit here is the row's.
        csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
        super().__init__(path, None if limit is None else limit + 1, max_bytes)
        self._header = self._read_header() if self._offsets else []

    def _read_header(self) -> list[str]:
        where = super().where(0)
        try:
            header = self._fields(0)
        except Fault as fault:
            raise UsageError(f"{where}: {fault.message}") from None
        for name in header:
            if header.count(name) > 1:
                raise UsageError(f"{where} column {shown(name)}: twice in the header", "rename one of them")
        if "" in header:
            self.notes.append(f"column {header.index('') + 1} has no name and is left out")
        return header

    def __len__(self) -> int:
        return max(0, len(self._offsets) - 1)

    def where(self, index: int) -> str:
        return super().where(index + 1)

    def read(self, index: int) -> dict[str, Any]:
        fields = self._fields(index + 1)
        if len(fields) != len(self._header):
            raise Fault("ragged_row", f"the row has {len(fields)} fields, the header has {len(self._header)}")
        return {name: field for name, field in zip(self._header, fields, strict=True) if name}

    def _fields(self, index: int) -> list[str]:
        try:
            (fields,) = csv.reader([self.text(index)], strict=True)
        except csv.Error as error:
            hint = "; is a quote left open, or not doubled?"
            raise Fault("bad_csv", f"not valid CSV: {str(error).partition(' - ')[0]}{hint}") from None
        return fields


def as_record(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise Fault("not_an_object", f"expected an object with named columns, got {shown(value)}")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _lines(stream: BufferedReader, max_bytes: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Line number, offset, length and bytes of each line; the bytes of an endless line are cut."""
    number, offset = 0, stream.tell()
    while text := stream.readline(max_bytes + 1):
        length, rest = len(text), text
        while not rest.endswith(b"\n") and (rest := stream.readline(1 << 20)):
            length += len(rest)
        number += 1
        yield number, offset, length, text
        offset += length
