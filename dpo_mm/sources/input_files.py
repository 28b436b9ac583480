"""Files that decide the rows of an import: tables and captions by their bytes, images and Parquet files by size and time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.data.image_files import IMAGE_SUFFIXES
from dpo_mm.data.text_files import table_suffix
from dpo_mm.files.content_key import content_hash, file_hash
from dpo_mm.sources.archives import ARCHIVE
from dpo_mm.sources.raw_rows import TABLE_SUFFIXES, Origin, open_raw_parquet, raw_rows

CONTENT_SUFFIXES = (".txt", ".caption", *(suffix for suffix in TABLE_SUFFIXES if suffix != ".parquet"))
"""Files that count by their bytes."""
LARGEST_TABLE = 2**28
"""Largest size of a table that `input_hash` reads, in bytes."""
LONGEST_PATH = 1000
"""Longest text of a row that may be the path of an image, in characters."""


def input_hash(origin: Origin, media: Path, folders: Sequence[Path]) -> str:
    """Hash the files of an import.

    Folders count by the sizes and times of their files, because a large dataset would take long to read. A single table
    counts with the images that it names, because other files next to it have nothing to do with it. A table of more than
    LARGEST_TABLE counts by its size and time. A dataset on the hub counts by its id alone.

    Args:
        origin: the raw rows.
        media: folder of the images that rows name.
        folders: folders that the user gave. Empty: a single table, or a dataset on the hub.
    """
    if not folders and len(origin.files) == 1 and origin.files[0].stat().st_size <= LARGEST_TABLE:
        return content_hash(files_of_rows(origin, media))
    files = dict.fromkeys([*origin.files, *(file for folder in folders for file in _files_below(folder))])
    return content_hash({str(file.absolute()): _size_and_time(file) for file in files})


def files_of_rows(origin: Origin, media: Path) -> dict[str, Any]:
    """Return the key of each file that decides the rows of an origin, by path. Empty for a dataset on the hub."""
    return {str(file.absolute()): _file_key(file) for file in dict.fromkeys(_files_of(origin, media))}


def _files_of(origin: Origin, media: Path) -> Iterator[Path]:
    """Yield the tables and the images that they name. If an image is missing, archives may have it, or other folders."""
    yield from origin.files
    if origin.read_image is not None:
        yield from _files_below(media)
        return
    missing: set[str] = set()
    for text in (text for file in origin.files for text in _texts(file, origin)):
        named = media / text.replace("\\", "/").lstrip("/")
        if _is_file(named):
            yield named
        elif named.suffix.lower() in IMAGE_SUFFIXES:
            missing.add(named.name)
    if missing:
        yield from (file for file in _files_below(media) if file.name in missing or ARCHIVE.match(file.name))


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _texts(file: Path, origin: Origin) -> Iterator[str]:
    """Yield the texts of a table that may be paths of images."""
    if file.suffix == ".parquet":
        table = open_raw_parquet(file)
        leaves = [table.schema.column(number) for number in range(len(table.schema))]
        paths = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        rows: Iterator[Any] = (row for batch in table.iter_batches(columns=paths) for row in batch.to_pylist())
    else:
        rows = raw_rows(origin._replace(files=(file,)))
    for row in rows:
        yield from (text for text in _leaves(row) if ".." not in text and "://" not in text)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str) and 0 < len(value) <= LONGEST_PATH and "\n" not in value:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a text that is no path
        return False


def _file_key(file: Path) -> Any:
    """Bytes of a small file as a hash, or size and time of a large one. None if it does not exist."""
    if table_suffix(file) in CONTENT_SUFFIXES and file.is_file():
        return file_hash(file)
    return _size_and_time(file)


def _size_and_time(file: Path) -> list[int] | None:
    """Size in bytes and time in nanoseconds of a file. None if it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
