"""Stream the raw rows of a dataset from the hub or from files. The dataset is never in memory as a whole.

Every row also has `_file` and `_number`, its file and its position in the dataset, and ORIGIN, its name for errors.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.data.image_files import IMAGE_SUFFIXES
from dpo_mm.data.parquet import open_parquet
from dpo_mm.data.row_paths import check_regular
from dpo_mm.data.text_files import open_text, read_text, table_suffix
from dpo_mm.errors import RowError, did_you_mean, name_row, one_line

Row = dict[str, Any]
ORIGIN = "_origin"
"""Key of a row with its name for errors: a file and the row in it, or an image file. It is not written."""
TABLE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
CAPTION_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files with the captions of a folder of images, as in Hugging Face's imagefolder."""
SPLITS = ("train", "validation", "valid", "val", "test")
PARQUET_BATCH = 64
"""Rows of Parquet in memory at once. A row can have a megabyte."""
CHUNK, LONGEST = 2**20, 2**26
"""Number of characters of JSON read at once, and the largest number per row."""
ROW_SEPARATOR = re.compile(r"[\s,]*")


class Origin(NamedTuple):
    """Origin of raw rows: files of a folder or, if there are none, splits of a dataset on the hub.

    `read_image` makes the row of an image file, if the files are images.
    """

    folder: Path
    files: tuple[Path, ...]
    hub: str = ""
    split: str = "train"
    read_image: Callable[[Path], Row] | None = None


Patterns = tuple[tuple[str, ...], ...]


def find_origin(path: str, *, split: str, patterns: Patterns, whole: bool) -> Origin:
    """Find the files, or the dataset on the hub, that a path names.

    Args:
        path: a folder, a file or a hub id.
        split: the split to read.
        patterns: the dataset's annotation files, each with alternative names, of which the first that exists is used.
            Empty: any file of the split.
        whole: True if the dataset on the hub is a folder of files. They are downloaded, because they cannot be streamed.

    Raises:
        ValueError: if there is no such path, or the folder does not contain the expected files.
    """
    local = Path(path)
    if local.is_file():
        return Origin(local.parent, (local,), split=split)
    if local.is_dir():
        return Origin(local, _files(local, split, patterns), split=split)
    if local.exists():
        raise ValueError(f"{path}: not a regular file. Give a file or a folder")
    if path.count("/") != 1 or path.startswith((".", "/")) or table_suffix(local) in TABLE_SUFFIXES:
        raise ValueError(f"{path}: no such file or folder. Give one, or a hub id as owner/name")
    if whole:
        folder = _download(path)
        return Origin(folder, _files(folder, split, patterns), split=split)
    return Origin(local, (), path, split)


def find_captions(folder: Path, split: str) -> Origin:
    """Find the captions of a folder of images: a table of CAPTION_TABLES, or else one text file per image.

    Args:
        folder: the images. If it has a folder of the split, they are in that one.
        split: the split to read.

    Raises:
        ValueError: if there is neither.
    """
    folder = split_folder(folder, split)
    table = next((folder / name for name in CAPTION_TABLES if (folder / name).exists()), None)
    if table is not None:
        return Origin(folder, (check_regular(table, folder),), split=split)
    images = [check_regular(file, folder) for file in images_below(folder)]
    if not any(file.with_suffix(".txt").exists() for file in images):
        raise ValueError(
            f"{folder}: no captions for its {len(images)} images. Expected a text file of the same name per image, or "
            f"{CAPTION_TABLES[0]} with file_name and text"
        )
    return Origin(folder, tuple(images), split=split, read_image=lambda file: _captioned(file, folder))


def split_folder(folder: Path, split: str) -> Path:
    """Return the folder of a split, or the folder itself if it has none."""
    return folder / split if (folder / split).is_dir() else folder


def images_below(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted, without hidden ones."""
    files = sorted(folder.rglob("*"))
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]


def _captioned(file: Path, folder: Path) -> Row:
    """Row of an image, with the text of its caption file if there is one."""
    caption = file.with_suffix(".txt")
    text = {"text": read_text(check_regular(caption, folder))} if caption.exists() else {}
    return {"file_name": file.relative_to(folder).as_posix(), **text}


def _files(folder: Path, split: str, patterns: Patterns) -> tuple[Path, ...]:
    if patterns:
        names = [[name.format(split=split) for name in alternatives] for alternatives in patterns]
        matches = [[sorted(folder.glob(name)) for name in alternatives] for alternatives in names]
        files = [check_regular(file, folder) for lists in matches for file in next(filter(None, lists), [])]
        expected = ", ".join(" or ".join(alternatives) for alternatives in names)
    else:
        every = sorted(
            file
            for file in folder.rglob("*")
            if table_suffix(file) in TABLE_SUFFIXES and not file.is_dir() and not file.name.startswith(".")
        )
        has_splits = any(_is_split(_stem(file), name) for file in every for name in SPLITS)
        files = [check_regular(file, folder) for file in every if not has_splits or _is_split(_stem(file), split)]
        expected = f"Parquet, JSON, JSON lines or CSV of split {split!r}"
    if not files:
        has = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: no {expected} in this folder (it contains {has})")
    return tuple(files)


def _stem(file: Path) -> str:
    return file.name[: file.name.index(table_suffix(file))]


def _is_split(name: str, split: str) -> bool:
    """Match train, train-00000-of-00645-b66ac786 and train_0001 (Rapidata), but not train_aes."""
    return re.fullmatch(rf"{re.escape(split)}([-_]\d+)?(-of-\d+)?(-[0-9a-f]{{6,}})?", name) is not None


def _download(name: str) -> Path:
    """Download a dataset's files through the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:
        raise ValueError(f"{name}: neither a folder nor reachable on the hub ({type(error).__name__})") from error


def count_rows(origin: Origin) -> int | None:
    """Return the number of rows, or None if it is unknown without reading them.

    Raises:
        ValueError: if a file is not readable as Parquet.
    """
    if not origin.files or any(file.suffix != ".parquet" for file in origin.files):
        return None
    return sum(open_raw_parquet(file).metadata.num_rows for file in origin.files)


def open_raw_parquet(file: Path) -> Any:
    """Open a Parquet file. Raises ValueError if it is not readable."""
    import pyarrow as pa

    try:
        return open_parquet(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error


def raw_rows(origin: Origin, *, start: int = 0) -> Iterator[Row]:
    """Yield the raw rows from number `start` on, each with `_file`, `_number` and ORIGIN.

    Raises:
        ValueError: if a file or a row is not readable. The error names it.
    """
    number = 0
    for name, rows in _rows_by_file(origin, start):
        first = number
        while True:
            row_name = name if origin.read_image else f"{name}, row {number - first}"
            with name_row(row_name, "Fix the file, or remove the row"):
                row = next(rows, None)
            if row is None:
                break
            if isinstance(row, int):  # the number of skipped rows
                number += row
                continue
            if number >= start:
                yield {**row, "_file": name, "_number": number, ORIGIN: row_name}
            number += 1


def name_raw_row(row: Row) -> name_row:
    """Context manager in which an error of a converter names the row and what may be wrong with it."""
    fix = "Check that the dataset belongs to this source, or remove the row"
    return name_row(row[ORIGIN], fix, columns=(name for name in row if not name.startswith("_")))


def _rows_by_file(origin: Origin, start: int) -> Iterator[tuple[str, Iterator[Any]]]:
    if not origin.files:
        yield origin.hub, _stream_hub(origin, start)
    for file in origin.files:
        if file.suffix == ".parquet":
            yield file.name, _parquet_rows(file, start)
            start = max(0, start - (count_rows(origin._replace(files=(file,))) or 0))
        else:
            is_image = origin.read_image is not None and file.suffix.lower() in IMAGE_SUFFIXES
            name = file.relative_to(origin.folder).as_posix() if is_image else file.name
            yield name, _image_row(origin, file) if is_image else _text_rows(file)
            start = 0  # raw_rows skips the other rows one by one


def _image_row(origin: Origin, file: Path) -> Iterator[Row]:
    assert origin.read_image is not None
    yield origin.read_image(file)


def first_rows(origin: Origin, count: int = 20) -> list[Row]:
    """Return the first raw rows, without the columns that were added."""
    rows = islice(raw_rows(origin), count)
    return [{name: cell for name, cell in row.items() if not name.startswith("_")} for row in rows]


def check_columns(rows: list[Row], columns: Mapping[str, str], name: str) -> None:
    """Check the names of columns to rename.

    Args:
        rows: the first raw rows.
        columns: new names by old ones.
        name: the dataset, for errors.

    Raises:
        ValueError: if no row has a column of an old name, or two columns get the same name.
    """
    has = dict.fromkeys(column for row in rows for column in row)
    for old in columns:
        if old not in has:
            raise ValueError(f"{name}: columns names {old!r}, which it does not have; {did_you_mean(old, has)}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"{name}: columns gives two columns the same name. Expected one old name per new one")


def rename_columns(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Rename columns of raw rows. A renamed column replaces one that has its new name."""
    for row in rows:
        rest = {name: cell for name, cell in row.items() if name not in columns}
        yield rest | {new: row[old] for old, new in columns.items() if old in row} if columns else row


def _stream_hub(origin: Origin, start: int) -> Iterator[Any]:
    """Stream rows with `datasets`, images undecoded. A split may have numbered parts (Rapidata)."""
    from datasets import Image, Value, concatenate_datasets, load_dataset

    splits: Any = load_dataset(origin.hub, streaming=True)
    names = [name for name in splits if name == origin.split] or [n for n in splits if _is_split(n, origin.split)]
    if not names:
        raise ValueError(
            f"{origin.hub}: no split {origin.split!r}. It has {', '.join(splits)}. Choose one with --split"
        )
    rows = concatenate_datasets([splits[name] for name in names])
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif getattr(feature, "dtype", None) == "large_binary":
            rows = rows.cast_column(column, Value("binary"))
    yield start
    yield from rows.skip(start)


def _parquet_rows(file: Path, start: int) -> Iterator[Any]:
    """Rows of one file. Row groups before the start are counted and not read."""
    table = open_raw_parquet(file)
    counts = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    groups = list(range(len(counts)))
    while groups and counts[groups[0]] <= start:
        start -= counts[groups[0]]
        yield counts[groups.pop(0)]
    for batch in table.iter_batches(PARQUET_BATCH, row_groups=groups) if groups else ():
        yield from batch.to_pylist()


def _text_rows(file: Path) -> Iterator[Row]:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith((".jsonl", ".json"))):
                with archive.open(name) as member:
                    yield from _json_objects(io.TextIOWrapper(member, encoding="utf-8"), f"{file}, {name}")
        return
    with open_text(file) as text:
        if table_suffix(file) == ".csv":
            csv.field_size_limit(LONGEST)
            table = csv.DictReader(text)
            if len(table.fieldnames or ()) == 1 and ";" in str(table.fieldnames):
                raise RowError(f"{file}: its separator is probably ';'. Save it with commas")
            yield from ({name: cell for name, cell in row.items() if name} for row in table)
        else:
            yield from _json_objects(text, str(file))


def _json_objects(text: Any, source_name: str) -> Iterator[Row]:
    """Yield the objects of a JSON list or of JSON lines. A list may be larger than memory."""
    decoder, buffer, number = json.JSONDecoder(), text.read(CHUNK), 0
    at = len(buffer) - len(buffer.lstrip())
    at += buffer.startswith("[", at)
    while True:
        at = ROW_SEPARATOR.match(buffer, at).end()  # type: ignore[union-attr]
        try:
            row, at = decoder.raw_decode(buffer, at)
        except RecursionError:
            raise RowError(f"{source_name}, row {number}: nested too deeply. Expected one object per row") from None
        except ValueError as error:
            more = text.read(max(CHUNK, len(buffer) - at)) if len(buffer) - at < LONGEST else ""
            if not more and buffer[at:].strip() in ("", "]"):
                return
            if not more:
                raise RowError(
                    f"{source_name}, row {number}: not JSON ({one_line(error)}). Expected one object per row"
                ) from None
            buffer, at = buffer[at:] + more, 0
            continue
        if not isinstance(row, dict):
            raise RowError(f"{source_name}, row {number}: is {str(row)[:40]!r}. Expected one object per row")
        yield row
        number += 1
