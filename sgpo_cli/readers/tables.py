"""Data sets that are one document: a JSON array keeps its text, Parquet and the Hub give an Arrow table."""

import bisect
import json
import re
from array import array
from typing import TYPE_CHECKING, Any, NoReturn

from sgpo_cli.errors import UsageError
from sgpo_cli.readers.strict import Fault, check_value, printable, shown, strict_json
from sgpo_cli.readers.text import BOM, BOM_NOTE, OpenFile, Records, as_record

if TYPE_CHECKING:
    import pyarrow as pa

SPACE = re.compile(r"[ \t\r\n]*")
# Only finds where values end; what they say is for strict_json.
LENIENT = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)


class JsonArray(Records):
    """A file that is one JSON array of objects; a broken array has no rows to set aside."""

    def __init__(self, path: str, limit: int | None, max_bytes: int) -> None:
        super().__init__(path)
        self._max_bytes = max_bytes
        self._starts, self._ends = array("Q"), array("Q")
        self._file = OpenFile(path)
        with self._file.stream() as stream:
            raw = stream.read()
        try:
            self._text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # The codec counts from behind the byte order mark.
            at = error.start + (len(BOM) if raw.startswith(BOM) else 0)
            line = raw.count(b"\n", 0, at) + 1
            raise UsageError(
                f"{printable(path)}:{line}: not UTF-8 at byte {at} of the file", "save the file as UTF-8"
            ) from None
        if raw.startswith(BOM):
            self.notes.append(BOM_NOTE)
        self._index(limit)

    def _index(self, limit: int | None) -> None:
        position = self._skip(self._skip(0) + 1)
        if self._text.startswith("]", position):
            return
        while len(self) != limit:
            self._starts.append(position)
            try:
                _, position = LENIENT.raw_decode(self._text, position)
            except json.JSONDecodeError as error:
                self._stop(error.pos, error.msg)
            except RecursionError:
                self._stop(position, "nested too deeply")
            self._ends.append(position)
            position = self._skip(position)
            if self._text.startswith("]", position):
                if self._skip(position + 1) < len(self._text):
                    self._stop(position, "text after the end of the array")
                return
            if not self._text.startswith(",", position):
                self._stop(position, "no comma and no end of the array after it; is the file cut off?")
            position = self._skip(position + 1)

    def _skip(self, position: int) -> int:
        found = SPACE.match(self._text, position)
        return found.end() if found else position

    def _stop(self, position: int, message: str) -> NoReturn:
        line = self._text.count("\n", 0, position) + 1
        raise UsageError(
            f"{printable(self.name)}:{len(self._starts)}: not valid JSON in line {line}: {message}",
            "a .json file is one array of objects, or one object a line",
        )

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> dict[str, Any]:
        self._file.check()
        start, end = self._starts[index], self._ends[index]
        if end - start > self._max_bytes:
            raise Fault("too_long", f"the row has {end - start} characters, at most {self._max_bytes} are allowed")
        return as_record(strict_json(self._text[start:end]))


class ArrowTable(Records):
    """A table of Parquet or of the Hub, taken apart in small batches."""

    def __init__(self, name: str, table: "pa.Table", file: OpenFile | None, limit: int | None, max_bytes: int) -> None:
        super().__init__(name)
        self._file = file
        self._max_bytes = max_bytes
        names = table.column_names
        if double := next((column for column in names if names.count(column) > 1), None):
            raise UsageError(f"{printable(name)} column {shown(double)}: twice in the table", "rename one of them")
        foreign = [field for field in table.schema if not _fits_json(field.type)]
        for field in foreign:
            self.notes.append(f"column {shown(field.name)} is left out: JSON has no form for {field.type}")
        kept = table.drop_columns([field.name for field in foreign]).slice(0, limit)
        self._batches = kept.to_batches(max_chunksize=1024)
        self._starts, self._length = array("Q"), 0
        for batch in self._batches:
            self._starts.append(self._length)
            self._length += batch.num_rows

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> dict[str, Any]:
        if self._file:
            self._file.check()
        number = bisect.bisect_right(self._starts, index) - 1
        row = self._batches[number].slice(index - self._starts[number], 1)
        if row.nbytes > self._max_bytes:
            raise Fault("too_long", f"the row has {row.nbytes} bytes, at most {self._max_bytes} are allowed")
        try:
            record: dict[str, Any] = row.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise Fault("not_utf8", f"a text is not UTF-8 ({error.reason})") from None
        for column, value in record.items():
            check_value(column, value)
        return record


def _fits_json(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_fits_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    if types.is_dictionary(kind):
        return _fits_json(kind.value_type)
    plain = types.is_null, types.is_boolean, types.is_integer, types.is_floating
    texts = types.is_string, types.is_large_string, types.is_string_view
    return any(test(kind) for test in plain + texts)


def open_parquet(path: str, limit: int | None, max_bytes: int) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = OpenFile(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            table = parquet.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{printable(path)}: is not a readable Parquet file: {reason}", "write it again") from error
    return ArrowTable(path, table, file, limit, max_bytes)
