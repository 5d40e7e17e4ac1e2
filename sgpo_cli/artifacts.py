"""The stage contract: a step reads directories and writes exactly one, and its manifest is written last.

    request.json    who the step is: configuration and input digests, written before any work
    parts/          the append log while it runs (`journal.py`)
    train.jsonl     the rows; `datasets.load_dataset(directory)` reads it and ignores the rest
    rejects.jsonl   every row that was dropped, with the reason
    manifest.json   written last, atomically: its existence *is* "done"

Standard library and a file lock only: "is this already done?" must be answered without loading torch.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from sgpo_cli.errors import IncompleteError, IntegrityError, LockedError, StaleError, UsageError
from sgpo_cli.journal import Journal

MANIFEST, REQUEST = "manifest.json", "request.json"
DATA_FILES = ("train.jsonl", "rejects.jsonl")
QUICK_VERIFY_BYTES = 1 << 28  # above this an up-to-date check trusts the size; a reader always hashes


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a crash at any moment leaves the old file or the new one, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """One of our own JSON files.

    Raises:
        IntegrityError: it is there but is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: not valid JSON ({error})", "run the step again with --fresh") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: expected a JSON object", "run the step again with --fresh")
    return value


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a finished step, or None while there is none."""
    path = directory / MANIFEST
    return read_json(path) if path.exists() else None


def step_of(path: Path) -> Path | None:
    """The step directory that `path` is or lies in, if it was made by a step."""
    for candidate in (path, *path.parents[:1]):
        if (candidate / REQUEST).exists():
            return candidate
    return None


def verify(directory: Path, *, under: Path | None = None, quick: bool = False) -> None:
    """Compare a step's files with the digests in its manifest, before anything parses them.

    Args:
        under: only the files below this path.
        quick: trust the size of very large files.

    Raises:
        IntegrityError: a file is missing or is not what the manifest says.
    """
    manifest = read_manifest(directory) or {}
    for name, facts in manifest.get("outputs", {}).items():
        path = directory / name
        if under is not None and not path.is_relative_to(under):
            continue
        if not path.is_file():
            raise IntegrityError(f"{path}: missing, but listed in {MANIFEST}", "run the step again with --fresh")
        size = path.stat().st_size
        hashed = not (quick and size > QUICK_VERIFY_BYTES)
        if size != facts["bytes"] or (hashed and sha256_file(path) != facts["sha256"]):
            raise IntegrityError(
                f"{path}: sha256 mismatch, the file changed after the step had finished",
                "restore it, or run the step again with --fresh",
            )


def digest(source: str) -> str:
    """The identity of an input: a step's manifest, or the content of a file or directory.

    A step's manifest names the run that made it, so whatever is built on a step is out of date as soon
    as that step has been run again.

    Raises:
        UsageError: the path does not exist, or is a step that has not finished.
    """
    path = Path(source)
    if not path.exists():
        raise UsageError(f"{source}: no such file or directory")
    step = step_of(path)
    if step is not None:
        if not (step / MANIFEST).exists():
            raise UsageError(f"{step}: this step has not finished", "run it again; it continues where it stopped")
        return f"step:{sha256_file(step / MANIFEST)}:{path.relative_to(step)}"
    if path.is_file():
        return f"file:{sha256_file(path)}"
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return f"directory:{sha256_json({file.name: sha256_file(file) for file in files})}"


@dataclass(frozen=True)
class Request:
    """What makes a step itself: another configuration or another input is another request."""

    stage: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "version": self.version,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
        }

    def changes(self, other: Mapping[str, Any]) -> list[str]:
        """Lines `key: old -> new` against a request read from disk."""
        old = {"stage": other.get("stage"), "version": other.get("version"), **other.get("config", {})}
        new = {"stage": self.stage, "version": self.version, **self.config}
        lines = [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in _differing(old, new)]
        return lines + [f"input {key}: changed since" for key in _differing(other.get("inputs", {}), self.inputs)]

    def only_inputs_changed(self, other: Mapping[str, Any]) -> bool:
        return all(line.startswith("input ") for line in self.changes(other))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


Outcome = tuple[Mapping[str, Any], str | None]
"""What became of a row: the row to write, and the reason if it is dropped."""


class Step:
    """One step's directory, from request to manifest.

    Nothing is written before `with step:`, so a stage can read and refuse its input first.
    """

    def __init__(self, directory: str | Path, request: Request) -> None:
        self.directory = Path(directory)
        self.request = request
        self._lock = FileLock(self.directory / ".lock", timeout=0)
        self._started = time.monotonic()

    def is_complete(self) -> bool:
        """Whether this very request has been finished.

        Raises:
            StaleError: the directory belongs to another request.
            IntegrityError: it is finished, but a file in it was changed.
        """
        path = self.directory / REQUEST
        if not path.exists():
            return False
        changes = self.request.changes(read_json(path))
        if changes:
            raise StaleError(
                f"{self.directory} was made by another request\n  " + "\n  ".join(changes),
                "choose another --output-dir, or pass --fresh to move the old one aside",
            )
        if read_manifest(self.directory) is None:
            return False
        verify(self.directory, quick=True)
        return True

    def move_aside(self) -> Path | None:
        """Rename the directory to `<name>.old`, replacing an earlier one; None if there is nothing to move."""
        if not self.directory.exists():
            return None
        with self._locked():
            aside = self.directory.with_name(self.directory.name + ".old")
            shutil.rmtree(aside, ignore_errors=True)
            self.directory.rename(aside)
        return aside

    def _locked(self) -> FileLock:
        try:
            self._lock.acquire()
        except Timeout:
            raise LockedError(
                f"{self.directory}: another process is working on this step",
                "wait for it to finish, or stop it; the lock goes with the process",
            ) from None
        return self._lock

    def __enter__(self) -> Self:
        if self.directory.exists() and not (self.directory / REQUEST).exists():
            first_files = (".lock", REQUEST + ".tmp")  # all that a step killed at its very start leaves
            others = [path.name for path in self.directory.iterdir() if path.name not in first_files]
            if others:
                raise UsageError(
                    f"{self.directory}: holds {', '.join(sorted(others)[:3])}, which no step of ours wrote",
                    "choose an empty --output-dir",
                )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._locked()
        try:
            self.is_complete()  # another process may have been here between the plan and the lock
            for leftover in self.directory.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            write_atomically(self.directory / REQUEST, json.dumps(self.request.as_dict(), indent=2) + "\n")
        except BaseException:
            self._lock.release()
            raise
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def journal(self, rank: int = 0) -> Journal:
        return Journal(self.directory / "parts", rank)

    def write_rows(self, outcomes: Iterable[Outcome]) -> dict[str, Any]:
        """Write `train.jsonl` and `rejects.jsonl` in the given order; returns the manifest's counts."""
        counts: Counter[str] = Counter()
        rows_out = 0
        paths = [self.directory / name for name in DATA_FILES]
        temporary = [path.with_name(path.name + ".tmp") for path in paths]
        with temporary[0].open("wb") as kept, temporary[1].open("wb") as dropped:
            for row, reason in outcomes:
                if reason is None:
                    rows_out += 1
                    kept.write(_line(row))
                else:
                    counts[reason] += 1
                    dropped.write(_line({**row, "reason": reason}))
            for file in (kept, dropped):
                file.flush()
                os.fsync(file.fileno())
        for source, target in zip(temporary, paths, strict=True):
            source.replace(target)
        if not rows_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "no rows"
            raise IncompleteError(
                f"{self.directory}: no row is left ({reasons}); see {paths[1].name} there",
                "look at the rejected rows, then run again with other options and --fresh",
            )
        return {
            "rows_in": rows_out + counts.total(),
            "rows_out": rows_out,
            "rejected": dict(sorted(counts.items())),
        }

    def finish(self, outputs: Iterable[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest: from here on the step is done.

        Args:
            outputs: names of the files that are the result, relative to the directory.
            facts: what else to record; see the README's list of manifest keys.
        """
        manifest = {
            **self.request.as_dict(),
            **facts,
            "seconds": round(time.monotonic() - self._started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run_id": os.urandom(8).hex(),
            "versions": versions(),
            "outputs": {
                name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for name in sorted(outputs)
                for path in [self.directory / name]
            },
        }
        sync_directory(self.directory)
        write_atomically(self.directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self.directory / "parts", ignore_errors=True)
        return manifest


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run gives."""
    import platform
    from importlib import metadata

    names = ("sgpo", "torch", "transformers", "trl", "datasets", "accelerate", "peft", "openai")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
