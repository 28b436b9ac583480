"""Checksums of the files that dpo-mm writes and reads again, so that a changed byte is noticed and not used."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.content_key import content_hash, file_hash
from dpo_mm.resumable import atomic_write

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
"""Checksums of a folder's files, by name. It is written last."""
FIELD = "checksum"
"""Name of the checksum in a JSON object."""


def write_checksums(folder: Path) -> None:
    """Write the checksum of every file of a folder into COMPLETE, except for model cards, which may be edited."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    files = sorted(path for path in paths if path != folder / COMPLETE)
    checksums = {str(path.relative_to(folder)): file_hash(path) for path in files}
    (folder / COMPLETE).write_text(json.dumps(checksums, indent=1))


def what_is_wrong(folder: Path) -> str | None:
    """Return what has changed in a folder since its COMPLETE was written, or None."""
    try:
        checksums = json.loads((folder / COMPLETE).read_text())
        assert isinstance(checksums, dict)
    except (OSError, ValueError, AssertionError):
        return f"{COMPLETE} is missing or broken"
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_hash(path) != checksum:
            return f"{name} has changed since it was written"
    return None


def remove_unchanged_files(folder: Path, *, replaced: Collection[str]) -> None:
    """Remove COMPLETE and the files that it lists, except for those that have changed since: they are the user's.

    Args:
        folder: folder of an earlier result.
        replaced: names of files and subfolders that the new result replaces. They are left to it.
    """
    try:
        checksums = json.loads((folder / COMPLETE).read_text())
        files = {folder / name: checksum for name, checksum in checksums.items() if Path(name).parts[0] not in replaced}
    except (OSError, ValueError, AttributeError):
        files = {}
    (folder / COMPLETE).unlink(missing_ok=True)
    for path, checksum in files.items():
        inside = folder.resolve() in path.resolve().parents
        if inside and path.is_file() and file_hash(path) == checksum:
            path.unlink()
            with contextlib.suppress(OSError):  # the folder has other files
                path.parent.rmdir()


def check_trained_files(folder: Path) -> None:
    """Check a trained adapter or model against its COMPLETE, if it has one.

    Raises:
        ValueError: if a file has changed since it was written.
    """
    if (folder / COMPLETE).is_file() and (reason := what_is_wrong(folder)):
        raise ValueError(
            f"{folder}: {reason}. Copy it again or train again. If you changed it yourself, delete {folder / COMPLETE}"
        )


@contextlib.contextmanager
def write_with_checksum(path: Path, *, fix: str | None = None) -> Iterator[Path]:
    """Context manager like `atomic_write` that also writes the checksum of the file, into a hidden file next to it."""
    with atomic_write(path, fix=fix) as temporary:
        yield temporary
        with atomic_write(_checksum_path(path), fix=fix) as checksum:
            checksum.write_text(file_hash(temporary))


def _checksum_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.checksum")


def is_intact(path: Path) -> bool:
    """Return True if a file that `write_with_checksum` wrote exists and has not changed. A changed one is logged."""
    if not path.is_file():
        return False
    checksum = _checksum_path(path)
    intact = checksum.is_file() and checksum.read_text() == file_hash(path)
    if not intact:
        logger.warning("%s has changed since it was written, and is made again", path)
    return intact


def missing_shards(paths: Sequence[Path]) -> list[int]:
    """Return the numbers of the missing or changed shards that are this process's part (RANK of WORLD_SIZE)."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return [number for number in range(rank, len(paths), world) if not is_intact(paths[number])]


def with_checksum(row: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of a JSON object to it."""
    return {**row, FIELD: content_hash(row)}


def without_checksum(row: Any) -> dict[str, Any] | None:
    """Return a JSON object without its checksum, or None if it has changed since `with_checksum`."""
    if not isinstance(row, dict):
        return None
    content = {name: value for name, value in row.items() if name != FIELD}
    return content if content_hash(content) == row.get(FIELD) else None
