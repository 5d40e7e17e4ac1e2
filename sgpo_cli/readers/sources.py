"""What the user named, and the reader for it: a file, a directory with one data file, or a Hub data set."""

import difflib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sgpo_cli.errors import UsageError
from sgpo_cli.readers.strict import printable, shown
from sgpo_cli.readers.tables import SPACE, ArrowTable, JsonArray, open_parquet
from sgpo_cli.readers.text import Csv, JsonLines, OpenFile, Records

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?", re.ASCII)
HUB_PATIENCE = 5.0


def open_source(source: str, split: str, limit: int | None, max_bytes: int) -> Records:
    """The records of a local path if there is one, else of a Hub data set; at most `limit` of them."""
    path = os.path.expanduser(source)
    if source and os.path.isdir(path):
        path = _data_file(path, split)
    elif not source or not os.path.exists(path):
        hub = HUB_NAME.fullmatch(source)
        if not hub or _looks_like_path(source):
            raise UsageError(f"{printable(source) or repr(source)}: no such file or directory", _similar(path))
        table, notes = load_hub_table(hub["name"], hub["config"], split)
        records = ArrowTable(source, table, None, limit, max_bytes)
        records.notes += notes
        return records
    return open_file(path, limit, max_bytes)


def open_file(path: str, limit: int | None, max_bytes: int) -> Records:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".csv":
        return Csv(path, limit, max_bytes)
    if suffix == ".parquet":
        return open_parquet(path, limit, max_bytes)
    if suffix == ".json" and _is_array(path):
        return JsonArray(path, limit, max_bytes)
    if suffix in SUFFIXES:
        records = JsonLines(path, limit, max_bytes)
        if suffix == ".json":
            records.notes.append("read as JSON Lines: the file does not start with a bracket")
        return records
    raise UsageError(f"{printable(path)}: unknown kind of file {shown(suffix)}", f"one of {', '.join(SUFFIXES)}")


def _is_array(path: str) -> bool:
    file = OpenFile(path)
    with file.stream() as stream:
        while chunk := stream.read(4096).decode("utf-8-sig", errors="replace"):
            if rest := chunk[SPACE.match(chunk).end() :]:  # type: ignore[union-attr]
                return rest.startswith("[")
    return False


def _data_file(folder: str, split: str) -> str:
    """The stage output in a directory, or else its one data file of that split."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{printable(folder)}: cannot be read: {error.strerror}") from error
    found = [name for name in names if name in {split + suffix for suffix in SUFFIXES}]
    if f"{split}.jsonl" in found:
        found = [f"{split}.jsonl"]
    if len(found) == 1:
        return os.path.join(folder, found[0])
    where = printable(folder)
    if found:
        raise UsageError(f"{where}: more than one data file: {', '.join(found)}", "name one of the files")
    there = ", ".join(printable(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    raise UsageError(
        f"{where}: no {split}.jsonl (or .json, .csv, .parquet) in it; it has: {there or 'nothing'}",
        "name a data file, or run the step that writes the directory to its end",
    )


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(SUFFIXES)


def _similar(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    except (OSError, ValueError):
        return "check the path"
    named = " or ".join(printable(os.path.join(folder, other)) for other in close)
    return f"did you mean {named}?" if named else "check the path"


def load_hub_table(name: str, config: str | None, split: str) -> tuple["pa.Table", list[str]]:
    """A data set of the Hub or of its local cache, as an Arrow table; quick also without a network."""
    import datasets

    notes: list[str] = []
    offline = False
    try:
        with _offline_if_unreachable() as offline:
            if offline:
                notes.append(f"the Hub is unreachable: {name} is read from the local cache")
            dataset = datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        where = "in the local cache, and the Hub is unreachable" if offline else "on the Hub"
        raise UsageError(
            f"{name}: no such file or directory, and no data set of this name {where}",
            _similar(name) if offline else "check the name; for a private data set, log in with `hf auth login`",
        ) from error
    except Exception as error:
        # What else a loader raises is about this data set (its split, its configuration, its files).
        reason = shown(str(error).partition("\n")[0], limit=300)[1:-1]
        raise UsageError(
            f"{name}: the data set cannot be loaded: {reason}", "org/name:config names one configuration"
        ) from error
    return dataset.with_format("arrow")[:], notes


@contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Ask once, briefly: with its own retries, `datasets` takes 24 s to find out that there is no network."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    offline = before or not _hub_answers(constants.ENDPOINT)
    # Both libraries copy the environment variable at import and have no other switch.
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    try:
        yield offline
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = before


def _hub_answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=HUB_PATIENCE)
        except Exception:  # any failure is the same answer
            return
        answered.set()

    # A thread, because no timeout reaches into a name lookup that hangs.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return answered.is_set()
