"""Files of JSON lines, each line with its checksum, to which work is appended as it is done.

Several processes never append to one file. All but the first append to parts of it until the first combines them.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.errors import one_line
from dpo_mm.files.checksums import with_checksum, without_checksum
from dpo_mm.files.resumable import atomic_write, explain_unwritten
from dpo_mm.process.process_rank import process_rank

logger = logging.getLogger(__name__)


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, each with its checksum."""
    with explain_unwritten(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(with_checksum(dict(row)), ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path, *, repair: bool = True) -> list[dict[str, Any]]:
    """Read a file of JSON lines and remove an incomplete last line from it.

    Args:
        path: the file.
        repair: False leaves the incomplete line in the file, to which another process may be appending.

    Returns:
        The rows without those that have changed since they were written, which are made again. Empty if the file does not
        exist.

    Raises:
        ValueError: if a complete line is not JSON.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file. Remove the folder {path.parent} and run again.")
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if repair and len(complete) < len(data):
        with atomic_write(path) as temporary:
            temporary.write_bytes(complete)
    try:
        rows = [without_checksum(dict(json.loads(line))) for line in complete.decode().split("\n") if line]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({one_line(error)}). Remove the folder {path.parent} and run again."
        ) from None
    if changed := rows.count(None):
        logger.warning("%s: %d rows have changed since they were written, and are made again", path, changed)
    return [row for row in rows if row is not None]


def own_part(path: Path) -> Path:
    """Return the file to which this process appends: `path` if it is the first, else a part of it."""
    rank = process_rank()
    return path if rank.is_first else path.with_name(f"{path.stem}-part{rank.index}{path.suffix}")


def list_parts(path: Path) -> list[Path]:
    """List the parts of `path`, to which other processes than the first append."""
    return sorted(path.parent.glob(f"{path.stem}-part[0-9]*{path.suffix}"))


def read_parts(path: Path) -> list[dict[str, Any]]:
    """Read the rows of `path` and of all its parts. Raise ValueError as `read_lines`."""
    rows = []
    for part in (path, *list_parts(path)):
        with contextlib.suppress(FileNotFoundError):  # the first process has combined the parts
            rows += read_lines(part, repair=part == own_part(path))
    return rows


def combine_parts(path: Path) -> None:
    """Move the rows of all parts into `path`. Only the first process may call it, when the others have no more to append."""
    if parts := list_parts(path):
        rows = read_parts(path)
        with atomic_write(path) as temporary:
            append_lines(temporary, rows)
        for part in parts:
            part.unlink()
