"""A step: one request, one directory, from the lock to the manifest."""

import json
import logging
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from sgpo_cli.artifacts import (
    DATA_FILES,
    MANIFEST,
    REQUEST,
    line,
    read_json,
    read_manifest,
    sha256_file,
    sha256_json,
    sync_directory,
    verify,
    versions,
    write_atomically,
)
from sgpo_cli.errors import IncompleteError, IntegrityError, LockedError, StaleError, UsageError
from sgpo_cli.journal import Journal
from sgpo_cli.ranks import Rank, SharedWorkDone

logger = logging.getLogger(__name__)
LOGS = ("parts", "paid")  # directories of logs
JOIN_SECONDS = 600.0


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

    Nothing is written or moved before `with step:`, so a stage can read and refuse its input first.

    Args:
        fresh: move an earlier output aside, whatever it is.
        rank: of several processes that work on the step, the main one writes all but the others' logs.
    """

    def __init__(
        self, directory: str | Path, request: Request, *, fresh: bool = False, rank: Rank | None = None
    ) -> None:
        self.directory = Path(directory)
        self.request = request
        self._fresh = fresh
        self.rank = rank or Rank()
        self._lock = FileLock(self._lock_of(self.rank), timeout=0)
        self._started = time.monotonic()
        self._is_new = True

    def is_complete(self) -> bool:
        """Whether this very request has been finished.

        Raises:
            StaleError: the directory belongs to another request.
            IntegrityError: it is finished, but a file in it was changed.
        """
        path = self.directory / REQUEST
        if self._fresh or not path.exists():
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

    def _lock_of(self, rank: Rank) -> Path:
        return self.directory / (".lock" if rank.is_main else f".lock-{rank.number:04d}")

    def works(self, rank: Rank) -> bool:
        """Whether the process with this rank is at work on the step."""
        path = self._lock_of(rank)
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    def _join(self) -> Self:
        """As a helping rank: begin when the main one has."""
        end = time.monotonic() + JOIN_SECONDS
        while not (self.directory / REQUEST).exists():
            if time.monotonic() > end:
                raise UsageError(
                    f"{self.directory}: rank 0 has not begun within {JOIN_SECONDS:g} s",
                    "start all ranks with the same options, on a directory that all of them see",
                )
            time.sleep(0.2)
        if self.is_complete():
            raise SharedWorkDone
        self._is_new = False
        self._locked()
        return self

    def _move_aside(self) -> None:
        """Rename an earlier output to `<name>.old-<n>`; nothing is ever deleted."""
        aside = next(
            path for n in count(1) if not (path := self.directory.with_name(f"{self.directory.name}.old-{n}")).exists()
        )
        with self._locked():
            self.directory.rename(aside)
        logger.info("%s: the old output is in %s", self.directory, aside)

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
        if not self.rank.is_main:
            return self._join()
        ours = any((self.directory / name).exists() for name in (REQUEST, MANIFEST))
        if not ours and self.directory.exists() and (others := self._files_besides_our_first()):
            raise UsageError(
                f"{self.directory}: holds {', '.join(others[:3])}, which no step of ours wrote",
                "choose an empty --output-dir",
            )
        if self._fresh and ours:
            self._move_aside()
        self._is_new = not (self.directory / REQUEST).exists()
        if self._is_new and (self.directory / MANIFEST).exists():
            raise IntegrityError(f"{self.directory}: {REQUEST} is missing", "run the step again with --fresh")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._locked()
        self._fresh = False
        try:
            if self.is_complete():  # by another process, between our look and our lock
                raise LockedError(f"{self.directory}: another process has just finished this step")
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
        # Refused before any work: the corrected command must not meet a directory of another request.
        if isinstance(error, UsageError) and self._is_new and not self._files_besides_our_first():
            shutil.rmtree(self.directory)
        if not self.rank.is_main and (self.directory / MANIFEST).exists():  # its log came after the main one's end
            shutil.rmtree(self.directory / "parts", ignore_errors=True)
        self._lock.release()

    def _files_besides_our_first(self) -> list[str]:
        """What lies in the directory besides the files that every step writes at its start."""
        first = (".lock", REQUEST, REQUEST + ".tmp")
        return sorted(
            path.name
            for path in self.directory.iterdir()
            if path.name not in first
            and not path.name.startswith(".lock-")
            and not (path.name in LOGS and not any(file.stat().st_size for file in path.iterdir()))
        )

    def journal(self, name: str = "rank") -> Journal:
        return Journal(self.directory / "parts", self.rank.number, name)

    def write_rows(self, outcomes: Iterable[Outcome]) -> dict[str, Any]:
        """Write `train.jsonl` and `rejects.jsonl` in the given order; returns the manifest's counts.

        Raises:
            SharedWorkDone: this is a helping rank, whose work ends here.
        """
        if not self.rank.is_main:
            raise SharedWorkDone
        counts: Counter[str] = Counter()
        rows_out = 0
        paths = [self.directory / name for name in DATA_FILES]
        temporary = [path.with_name(path.name + ".tmp") for path in paths]
        with temporary[0].open("wb") as kept, temporary[1].open("wb") as dropped:
            for row, reason in outcomes:
                if reason is None:
                    rows_out += 1
                    kept.write(line(row))
                else:
                    counts[reason] += 1
                    dropped.write(line({**row, "reason": reason}))
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

    def finish(self, outputs: Iterable[str], facts: Mapping[str, Any]) -> None:
        """Write the manifest: from here on the step is done.

        Args:
            outputs: names of the files that are the result, relative to the directory.
            facts: what else to record; see the README's list of manifest keys.
        """
        manifest: dict[str, Any] = {
            **self.request.as_dict(),
            **facts,
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run_id": os.urandom(8).hex(),
            "versions": versions(),
            "outputs": {
                name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for name in sorted(outputs)
                for path in [self.directory / name]
            },
        }
        manifest["digest"] = sha256_json(manifest)
        sync_directory(self.directory)
        write_atomically(self.directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self.directory / "parts", ignore_errors=True)
