"""Files of JSON lines, each line with its checksum, to which work is appended as it is done."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.checksums import with_checksum, without_checksum
from dpo_mm.errors import one_line
from dpo_mm.resumable import atomic_write, explain_unwritten

logger = logging.getLogger(__name__)


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, each with its checksum."""
    with explain_unwritten(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(with_checksum(dict(row)), ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines and remove an incomplete last line from it.

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
    if len(complete) < len(data):
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
