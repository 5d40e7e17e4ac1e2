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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sgpo_cli.errors import IntegrityError, UsageError

MANIFEST, REQUEST = "manifest.json", "request.json"
DATA_FILES = ("train.jsonl", "rejects.jsonl")
QUICK_VERIFY_BYTES = 1 << 28  # above this an up-to-date check trusts the size; a reader always hashes


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write so that a crash at any moment leaves the old file or the new one, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
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
    """The manifest of a finished step, or None while there is none.

    Raises:
        IntegrityError: it is not what the step wrote.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.pop("digest", None) != sha256_json(manifest):
        raise IntegrityError(f"{path}: changed after the step had finished", "run the step again with --fresh")
    return manifest


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
        raise UsageError(f"{source}: no such file or directory", "relative paths start where you are")
    step = step_of(path)
    if step is not None:
        if not (step / MANIFEST).exists():
            raise UsageError(f"{step}: this step has not finished", "run it again; it continues where it stopped")
        return f"step:{sha256_file(step / MANIFEST)}:{path.relative_to(step)}"
    if path.is_file():
        return f"file:{sha256_file(path)}"
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return f"directory:{sha256_json({file.name: sha256_file(file) for file in files})}"


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(map(line, rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run gives."""
    import platform
    from importlib import metadata

    names = ("sgpo", "torch", "transformers", "trl", "datasets", "accelerate", "peft", "openai", "vllm")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
