"""Checksums of the files that dpo-mm writes and reads again, so that a changed byte is noticed and not used."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.files.content_key import content_hash, file_hash
from dpo_mm.files.resumable import FIX, atomic_write, set_aside
from dpo_mm.process.process_rank import process_rank

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
"""Checksums of a folder's files, by name. It is written last."""
FIELD = "checksum"
"""Name of the checksum in a JSON object."""


def write_checksums(folder: Path) -> None:
    """Write the checksum of every file of a folder into COMPLETE."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / COMPLETE)
    write_complete(folder, {str(path.relative_to(folder)): file_hash(path) for path in files})


def write_complete(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write checksums by name into a folder's COMPLETE."""
    with atomic_write(folder / COMPLETE) as temporary:
        temporary.write_text(json.dumps(checksums, indent=1), encoding="utf-8")


def complete_files(folder: Path) -> dict[str, str]:
    """Return the checksums in a folder's COMPLETE, by name, without names outside the folder. Empty if it is missing or broken."""
    try:
        checksums = dict(json.loads((folder / COMPLETE).read_text(encoding="utf-8")))
        return {name: checksum for name, checksum in checksums.items() if _is_inside(folder / name, folder)}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def made_files(folder: Path) -> dict[str, str]:
    """Return the checksums that dpo-mm wrote for the files of a folder, by name."""
    sidecars = {
        path.name[1:-9]: path.read_text(encoding="utf-8", errors="replace")
        for path in folder.glob(".*.checksum")
        if path.is_file()
    }
    return sidecars | complete_files(folder)


def changed_files(folder: Path, checksums: Mapping[str, str], *, missing: bool = True) -> list[str]:
    """Return the names of files that have changed since they were written, except for model cards, which may be edited.

    Args:
        folder: folder of the files.
        checksums: checksums by name.
        missing: a file that does not exist counts as changed.
    """
    return [
        name
        for name, checksum in checksums.items()
        if not name.endswith(".md") and (file_hash(folder / name) != checksum if (folder / name).is_file() else missing)
    ]


def what_is_wrong(folder: Path) -> str | None:
    """Return what has changed in a folder since its COMPLETE was written, or None."""
    checksums = complete_files(folder)
    if not checksums:
        return f"{COMPLETE} is missing or broken"
    for name in changed_files(folder, checksums):
        return f"{name} has changed since it was written" if (folder / name).is_file() else f"{name} is missing"
    return None


def remove_unchanged_files(folder: Path) -> None:
    """Remove COMPLETE and the files of `made_files`, except for those that have changed since: they are the user's."""
    files = made_files(folder)
    (folder / COMPLETE).unlink(missing_ok=True)
    for name, checksum in files.items():
        path = folder / name
        if path.is_file() and not path.is_symlink() and file_hash(path) == checksum:
            path.unlink()
            checksum_path(path).unlink(missing_ok=True)
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
def write_with_checksum(path: Path, *, fix: str = FIX) -> Iterator[Path]:
    """Context manager like `atomic_write` that also writes the checksum of the file, into a hidden file next to it.

    A file without a checksum is not ours, so it is renamed.
    """
    with atomic_write(path, fix=fix) as temporary:
        yield temporary
        if not checksum_path(path).is_file():
            set_aside(path)
        with atomic_write(checksum_path(path), fix=fix) as checksum:
            checksum.write_text(file_hash(temporary), encoding="utf-8")


def checksum_path(path: Path) -> Path:
    """Return the hidden file with the checksum of a file."""
    return path.with_name(f".{path.name}.checksum")


def is_unchanged(path: Path) -> bool:
    """Return True if a file that `write_with_checksum` wrote exists and has not changed."""
    checksum = checksum_path(path)
    return path.is_file() and checksum.is_file() and checksum.read_bytes() == file_hash(path).encode()


def is_intact(path: Path) -> bool:
    """Return True if a shard that `write_with_checksum` wrote exists and has not changed. A changed one is logged."""
    if not path.is_file():
        return False
    if not (intact := is_unchanged(path)):
        logger.warning("%s has changed since it was written, and is made again", path)
    return intact


def missing_shards(paths: Sequence[Path]) -> list[int]:
    """Return the numbers of the missing or changed shards that this process makes."""
    return [number for number in process_rank().share(len(paths)) if not is_intact(paths[number])]


def saved_shards(folder: str | Path) -> str:
    """Describe the shards in a folder for the message of an interruption. "" if there are none."""
    count = len(list(Path(folder).glob("[a-z]*-[0-9][0-9][0-9][0-9][0-9]*")))
    return f"{count} complete shard{'s are' if count > 1 else ' is'} in {folder}" if count else ""


def all_intact(paths: Sequence[Path], target: Path) -> bool:
    """Return True if all shards exist and have not changed, else log which are missing and who writes `target`."""
    missing = [path.name for path in paths if not is_intact(path)]
    if missing:
        logger.warning(
            "%s is not written yet: %d of %d shards are missing in %s (%s%s). They are the part of other processes. The last "
            "process writes it. If no other runs, run the same command again without RANK and WORLD_SIZE",
            target.name, len(missing), len(paths), paths[0].parent, ", ".join(missing[:3]), ", ..." * (len(missing) > 3),
        )  # fmt: skip
    return not missing


def with_checksum(row: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of a JSON object to it."""
    return {**row, FIELD: content_hash(row)}


def without_checksum(row: Any) -> dict[str, Any] | None:
    """Return a JSON object without its checksum, or None if it has changed since `with_checksum`."""
    if not isinstance(row, dict):
        return None
    content = {name: value for name, value in row.items() if name != FIELD}
    return content if content_hash(content) == row.get(FIELD) else None
