"""The strict reader of data sets: every row checked once, before anything is loaded, paid for or written.

`read_rows` takes a file, a directory or a Hub name and gives `Rows`, an immutable sequence whose rows are
decoded when they are asked for. Errors name `file:row column 'x'`: the line for JSON Lines and CSV, the
number of the row for the rest, both counted from 1.
"""

import difflib
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sgpo_cli.errors import IncompleteError, IntegrityError, UsageError
from sgpo_cli.readers.sources import open_source
from sgpo_cli.readers.strict import Fault, printable, shown
from sgpo_cli.readers.text import Records
from sgpo_cli.schema import NEEDS, REFERENCES, Columns, Message, Parsed, Row, Schema
from sgpo_cli.sliced import Sliced

__all__ = ["BadRow", "Columns", "Message", "Row", "Rows", "read_rows"]

SHOWN = 20
STANDARD = Columns()
# What other data sets call our columns, for "did you mean".
ALIASES = {
    "prompt": ("instruction", "question", "query", "input", "problem", "user"),
    "completion": ("output", "answer", "solution", "response", "text", "assistant"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat"),
    "id": ("prompt_id", "uid", "uuid", "key", "index"),
}


@dataclass(frozen=True)
class BadRow:
    """A row set aside. `index` counts from 0: in the source for `read_rows`, in the rows searched for
    `control_tokens`; `reason` is one word for counting."""

    index: int
    where: str
    column: str
    reason: str
    message: str

    def __str__(self) -> str:
        column = f" column {shown(self.column)}" if self.column else ""
        return f"{self.where}{column}: {self.message}"


class Rows(Sliced[Row]):
    """The good rows of a source, checked; the file behind them must not change while they are used."""

    def __init__(
        self,
        records: Records,
        schema: Schema,
        kept: "array[int]",
        repeats: dict[int, int],  # position -> 2, 3, ... for a prompt that was there before
        rejected: list[BadRow],
        notes: list[str],
    ) -> None:
        self.source = records.name
        self.rejected = rejected
        self.notes = notes
        self._records = records
        self._schema = schema
        self._kept = kept
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Row]:
        return map(self.item, range(len(self)))

    def where(self, position: int) -> str:
        """`file:row` of a row, for messages."""
        return self._records.where(self._kept[position])

    def item(self, position: int) -> Row:
        try:
            parsed = self._schema.parse(self._records.read(self._kept[position]))
        except Fault as fault:
            raise IntegrityError(f"{self.where(position)}: no longer what it was: {fault.message}") from None
        identity = parsed.id or f"{prompt_digest(parsed.row['prompt']):012x}"
        if parsed.id is None and position in self._repeats:
            identity = f"{identity}-{self._repeats[position]}"
        return {"id": identity, **parsed.row}


def read_rows(
    source: str,
    needs: Sequence[str],
    *,
    columns: Columns = STANDARD,
    max_rows: int | None = None,
    part: tuple[int, int] = (1, 1),
    on_bad_row: Literal["stop", "reject"] = "stop",
    max_reject_share: float = 0.01,
    split: str = "train",
    max_row_bytes: int = 1 << 20,
) -> Rows:
    """The rows of a file, a directory or a Hub data set (`name`, `org/name`, `org/name:config`), all checked.

    Each row has `id`, `prompt` (messages) and what `needs` names: `reference`, `response` and `target` as
    text, `chosen` and `rejected` as one assistant message. Its other columns follow as they are.
    `split` names the file in a directory (`train.jsonl`) or the split of a Hub data set; `max_rows` takes
    the first rows of the source, before any are rejected. `part` (2, 4) takes the second of four contiguous parts
    that differ by at most one row, before `max_rows`; the parts have no row in common and together have all.

    Raises UsageError for what is wrong with the source or its rows, IncompleteError when more than
    `max_reject_share` of them had to be rejected.
    """
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"unknown needs: {sorted(unknown)}")
    if columns.prompt and columns.messages:
        raise UsageError("--prompt-column and --messages-column exclude each other", "keep one of them")
    if max_rows is not None and max_rows < 1:
        raise UsageError(f"--max-rows: expected at least 1, got {max_rows}")
    records = open_source(source, split, max_rows if part == (1, 1) else None, max_row_bytes)
    if not len(records):
        raise UsageError(f"{printable(records.name)}: no rows in it", "a data file needs at least one row")
    wanted = _wanted(len(records), part)[:max_rows]
    if not wanted:
        raise UsageError(f"{printable(records.name)}: {len(records)} rows make no {part[1]} parts", "use fewer parts")
    allowed = int(max_reject_share * len(wanted)) if on_bad_row == "reject" else 0
    check = _Check(records, wanted, Schema(tuple(needs), columns), room=max(SHOWN, allowed))
    for index in wanted:
        check.add(index)
    check.reject_repeated_ids()
    check.refuse_missing_column()
    if check.bad_count and on_bad_row == "stop":
        raise UsageError(check.report(), "fix the rows, or pass --on-bad-row reject to set them aside")
    if check.bad_count > allowed or not check.kept:
        share = f"{check.bad_count} of {len(wanted)} rows are bad, at most {max_reject_share:.2%} may be"
        raise IncompleteError(f"{printable(records.name)}: {share}:\n{check.report()}", "fix the rows")
    return check.rows()


def _wanted(count: int, part: tuple[int, int]) -> range:
    number, parts = part
    return range((number - 1) * count // parts, number * count // parts)


class _Check:
    """One pass over the records: what is kept, what is wrong, and what is there twice.

    Holds numbers, not rows: 24 bytes a row, and for a moment 40 more while they are sorted.
    """

    def __init__(self, records: Records, wanted: range, schema: Schema, room: int) -> None:
        self.records = records
        self.wanted = wanted
        self.schema = schema
        self.room = room
        self.kept = array("Q")
        self.bad: list[BadRow] = []
        self.bad_count = 0
        self._prompts = array("Q")
        self._ids = array("Q")
        self._first: tuple[int, Parsed] | None = None
        self._missing: dict[str, int] = {}
        self._seen: dict[str, None] = {}

    def add(self, index: int) -> None:
        try:
            raw = self.records.read(index)
            if len(self._seen) < 100:
                self._seen.update(dict.fromkeys(raw))
            parsed = self.schema.parse(raw)
            self._same_form(index, parsed)
        except Fault as fault:
            self._reject(index, fault)
            return
        self.kept.append(index)
        self._prompts.append(prompt_digest(parsed.row["prompt"]))
        if parsed.id is not None:
            self._ids.append(_digest(parsed.id, 64))

    def _reject(self, index: int, fault: Fault) -> None:
        self.bad_count += 1
        if fault.reason == "missing_column":
            self._missing[fault.column] = self._missing.get(fault.column, 0) + 1
        if len(self.bad) < self.room:
            where = self.records.where(index)
            self.bad.append(BadRow(index, where, fault.column, fault.reason, fault.message))

    def _same_form(self, index: int, parsed: Parsed) -> None:
        """Rows written in two ways are two data sets; `datasets` would take the second for nulls."""
        if self._first is None:
            self._first = index, parsed
        first, model = self._first
        for part, (column, form) in parsed.forms.items():
            if (column, form) != model.forms[part]:
                other_column, other_form = model.forms[part]
                elsewhere = f" in column {shown(other_column)}" if column != other_column else ""
                message = f"{form} here, but {other_form}{elsewhere} at {self.records.where(first)}"
                raise Fault("mixed_schema", message, column)

    def reject_repeated_ids(self) -> None:
        """After the pass: sorting numbers once needs a third of the memory of a dict kept along the way."""
        repeated = _repeats(self._ids)
        for position, first in repeated.items():
            index = self.kept[position]
            parsed = self.schema.parse(self.records.read(index))
            message = f"the id {shown(parsed.id)} is also at {self.records.where(self.kept[first])}"
            self._reject(index, Fault("duplicate_id", message, parsed.forms["id"][0]))
        if repeated:
            good = [position for position in range(len(self.kept)) if position not in repeated]
            self.kept = array("Q", [self.kept[position] for position in good])
            self._prompts = array("Q", [self._prompts[position] for position in good])
            self.bad.sort(key=lambda bad: bad.index)

    def refuse_missing_column(self) -> None:
        """A column that no row has is a wrong name, not a bad row."""
        for column, count in self._missing.items():
            if count == len(self.wanted):
                names = ", ".join(shown(name) for name in list(self._seen)[:SHOWN])
                left_out = "".join(f"; {note}" for note in self.records.notes if "left out" in note)
                raise UsageError(
                    f"{self.records.where(self.wanted[0])} column {shown(column)}: no row has this column; "
                    f"there are: {names or 'none'}{left_out}",
                    self._column_hint(column),
                )

    def _column_hint(self, column: str) -> str:
        columns = self.schema.columns
        if column in ("target", "chosen", "rejected", *(set(self.schema.needs) & {"response"})):
            return f"the data set needs the column {column}: is it the output of the right step?"
        named = {columns.prompt: "prompt", columns.completion: "completion", columns.messages: "messages"}
        option = {**named, columns.id: "id"}.get(column, "completion" if column in REFERENCES else column)
        standard = [name for name in ALIASES[option] if name in self._seen]
        close = difflib.get_close_matches(column, self._seen, n=1)
        conversation = next((name for name in ("messages", *ALIASES["messages"]) if name in self._seen), None)
        if close or standard:
            return f"did you mean --{option}-column {shown((close or standard)[0])}?"
        if conversation and option in ("prompt", "completion"):
            return f"did you mean --messages-column {shown(conversation)}?"
        return f"name it with --{option}-column"

    def report(self) -> str:
        lines = [str(bad) for bad in self.bad[:SHOWN]]
        if self.bad_count > SHOWN:
            lines.append(f"and {self.bad_count - SHOWN} more")
        return "\n".join(lines)

    def rows(self) -> Rows:
        repeats, counts = _repeats(self._prompts), Counter[int]()
        for position, first in repeats.items():
            counts[first] += 1
            repeats[position] = counts[first] + 1
        notes = list(self.records.notes)
        if repeats:
            notes.append(f"{len(repeats)} of {len(self.kept)} rows repeat the prompt of an earlier row")
        return Rows(self.records, self.schema, self.kept, repeats, self.bad, notes)


def prompt_digest(prompt: list[Message]) -> int:
    """48 bits that depend on the prompt alone, so a row keeps its id wherever it stands in the file."""
    return _digest(json.dumps(prompt, sort_keys=True, ensure_ascii=False, separators=(",", ":")), 48)


def _digest(text: str, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def _repeats(keys: "array[int]") -> dict[int, int]:
    """Position -> first position, for every key that was there before."""
    doubled = {key for key, following in pairwise(sorted(keys)) if key == following}
    first: dict[int, int] = {}
    return {
        position: first[key]
        for position, key in enumerate(keys)
        if key in doubled and first.setdefault(key, position) != position
    }
