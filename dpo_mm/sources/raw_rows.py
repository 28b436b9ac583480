"""A set's raw rows, one after the other, from the hub or from files, never the whole of it in memory.

Every row also says `_file` and `_number`, where it stands in the set.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
ROWS = (".parquet", ".jsonl", ".json", ".csv")
SPLITS = ("train", "validation", "valid", "val", "test")
BATCH = 64
"""Rows of Parquet held at once; a row can be a megabyte."""
CHUNK, LONGEST = 2**20, 2**26
"""Characters of JSON read at once, and of a row at most."""
BETWEEN = re.compile(r"[\s,]*")


class Origin(NamedTuple):
    """Where raw rows come from: files of a folder, or (where there are none) splits of a set on the hub."""

    folder: Path
    files: tuple[Path, ...]
    hub: str = ""
    split: str = "train"


Patterns = tuple[tuple[str, ...], ...]


def find(path: str, *, split: str, patterns: Patterns, whole: bool) -> Origin:
    """The origin of a set's rows. patterns: its annotation files, of each the first that is there; none: any file.

    whole: a set on the hub is a folder of files, which are downloaded, and not rows that can be streamed.
    Raises ValueError that names the path, what is there, what was expected.
    """
    place = Path(path)
    if place.is_file():
        return Origin(place.parent, (place,), split=split)
    if place.is_dir():
        return Origin(place, _files(place, split, patterns), split=split)
    if path.count("/") != 1 or path.startswith((".", "/")) or place.suffix in ROWS:
        raise ValueError(f"{path}: no such file or folder; give one, or a hub id as owner/name")
    if whole:
        place = _download(path)
        return Origin(place, _files(place, split, patterns), split=split)
    return Origin(place, (), path, split)


def _files(folder: Path, split: str, patterns: Patterns) -> tuple[Path, ...]:
    if patterns:
        names = [[name.format(split=split) for name in either] for either in patterns]
        found = [f for either in names for f in next(filter(None, (sorted(folder.glob(n)) for n in either)), [])]
        expected = ", ".join(" or ".join(either) for either in names)
    else:
        every = sorted(file for kind in ROWS for file in folder.rglob(f"*{kind}") if not file.name.startswith("."))
        told = any(_is_split(file.stem, name) for file in every for name in SPLITS)
        found = [file for file in every if not told or _is_split(file.stem, split)]
        expected = f"Parquet, JSON, JSON lines or CSV of split {split!r}"
    if not found:
        has = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: no {expected} there (it holds {has})")
    return tuple(found)


def _is_split(name: str, split: str) -> bool:
    """train, train-00000-of-00645-b66ac786, train_0001 (Rapidata's splits are numbered), but not train_aes."""
    return re.fullmatch(rf"{re.escape(split)}([-_]\d+)?(-of-\d+)?(-[0-9a-f]{{6,}})?", name) is not None


def _download(name: str) -> Path:
    """A hub set's files, through the hub's own cache. Raises ValueError where it can't be reached."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:
        raise ValueError(f"{name}: neither a folder nor reachable on the hub ({type(error).__name__})") from error


def total(origin: Origin) -> int | None:
    """How many rows there are, where that is known without reading them. Raises ValueError for a broken file."""
    if not origin.files or any(file.suffix != ".parquet" for file in origin.files):
        return None
    return sum(_table(file).metadata.num_rows for file in origin.files)


def _table(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error


def raw_rows(origin: Origin, *, start: int = 0) -> Iterator[Row]:
    """The rows from the `start`-th on. Raises ValueError that names the file and row where one is broken."""
    number = 0
    for name, rows in _parts(origin, start):
        for row in rows:
            if isinstance(row, int):  # so many were passed over
                number += row
                continue
            if number >= start:
                yield {**row, "_file": name, "_number": number}
            number += 1


def _parts(origin: Origin, start: int) -> Iterator[tuple[str, Iterator[Any]]]:
    if not origin.files:
        yield origin.hub, _hub(origin, start)
    for file in origin.files:
        if file.suffix == ".parquet":
            yield file.name, _parquet(file, start)
            start = max(0, start - (total(origin._replace(files=(file,))) or 0))
        else:
            yield file.name, _text(file)
            start = 0  # what is left is passed over row by row


def _hub(origin: Origin, start: int) -> Iterator[Any]:
    """Streamed by `datasets`, pictures undecoded. A set may have the split, or numbered parts of it (Rapidata)."""
    from datasets import Image, Value, concatenate_datasets, load_dataset

    splits: Any = load_dataset(origin.hub, streaming=True)
    names = [name for name in splits if name == origin.split] or [n for n in splits if _is_split(n, origin.split)]
    if not names:
        raise ValueError(f"{origin.hub}: no split {origin.split!r}; it has {', '.join(splits)}; take one with --split")
    rows = concatenate_datasets([splits[name] for name in names])
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif getattr(feature, "dtype", None) == "large_binary":
            rows = rows.cast_column(column, Value("binary"))
    yield start
    yield from rows.skip(start)


def _parquet(file: Path, start: int) -> Iterator[Any]:
    """Rows of one file; groups before the start are passed over by their count, unread."""
    table = _table(file)
    counts = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    groups = list(range(len(counts)))
    while groups and counts[groups[0]] <= start:
        start -= counts[groups[0]]
        yield counts[groups.pop(0)]
    for batch in table.iter_batches(BATCH, row_groups=groups) if groups else ():
        yield from batch.to_pylist()


def _text(file: Path) -> Iterator[Row]:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith((".jsonl", ".json"))):
                with archive.open(name) as member:
                    yield from _objects(io.TextIOWrapper(member, encoding="utf-8"), f"{file}, {name}")
        return
    with file.open(encoding="utf-8-sig", newline="") as text:
        yield from csv.DictReader(text) if file.suffix == ".csv" else _objects(text, str(file))


def _objects(text: Any, where: str) -> Iterator[Row]:
    """The objects of a JSON list or of JSON lines, one at a time: a list can be larger than memory."""
    decoder, buffer, number = json.JSONDecoder(), text.read(CHUNK), 0
    at = len(buffer) - len(buffer.lstrip())
    at += buffer.startswith("[", at)
    while True:
        at = BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        try:
            row, at = decoder.raw_decode(buffer, at)
        except ValueError as error:
            more = text.read(max(CHUNK, len(buffer) - at)) if len(buffer) - at < LONGEST else ""
            if not more and buffer[at:].strip() in ("", "]"):
                return
            if not more:
                raise ValueError(f"{where}, row {number}: not JSON ({error}); expected an object a row") from None
            buffer, at = buffer[at:] + more, 0
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{where}, row {number}: is {str(row)[:40]!r}; expected an object a row")
        yield row
        number += 1
