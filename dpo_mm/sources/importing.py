"""Import a dataset: read raw rows, convert them, load their images, and write them as Parquet.

These steps are the same for every dataset. Only the converter differs, see `dpo_mm.sources.SOURCES`.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_mm.data.image_files import has_image_signature
from dpo_mm.data.lazy_images import source_cells, source_column
from dpo_mm.data.schema import image_preference, response_preference
from dpo_mm.data.several_captions import CAPTIONS, split_captions
from dpo_mm.errors import did_you_mean, name_row
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.sources import SOURCES, Source, fine_tuning_sets, input_files
from dpo_mm.sources.archives import ImageFiles
from dpo_mm.sources.input_files import LONGEST_PATH
from dpo_mm.sources.parquet_writer import (
    INPUT_HASH,
    ImportState,
    Item,
    LeftOut,
    Row,
    open_import,
    row_name,
    write_shards,
)
from dpo_mm.sources.raw_rows import (
    ORIGIN,
    Origin,
    check_columns,
    count_rows,
    find_origin,
    first_rows,
    name_raw_row,
    raw_rows,
    rename_columns,
)

FIX = "Fix the row, or remove it"
SHORTEST_BASE64 = 40
"""Shorter texts are paths and not images in base64."""
WITH_LISTS = ("custom-images", "captioned-images")
"""Sources whose prompts may be lists of captions, and whose images to edit may be lists."""
MISSING = "an image is missing"
SCRATCH = ".unpacked"
"""Subfolder of the output for unpacked archives. It is removed after the import."""


@dataclass(frozen=True)
class ImportResult:
    """Result of an import.

    Args:
        folder: folder with the shards.
        rows: number of rows written.
        shards: number of files.
        preferences: number of rows by preference, of image pairs.
        left_out: number of rows left out, by reason.
        examples: first row left out, by reason.
    """

    folder: Path
    rows: int
    shards: int
    preferences: dict[str, int]
    left_out: dict[str, int]
    examples: dict[str, str]


def import_set(
    source: str,
    path: str,
    output: str,
    *,
    split: str = "train",
    axis: str | None = None,
    min_score_gap: float | None = None,
    limit: int | None = None,
    license: str | None = None,
    columns: Mapping[str, str] | None = None,
    media_dir: str | None = None,
    input_hash: str | None = None,
    overwrite: bool = False,
) -> ImportResult:
    """Import a dataset into a folder of Parquet files that `load_pairs` and `load_responses` load.

    An interrupted import resumes.

    Args:
        source: a key of SOURCES.
        path: a folder, a file, a hub id, or "hub" for the source's dataset on the hub.
        output: folder to write.
        split: split of the dataset.
        axis: preference axis, if the source has several. None: the first, or all if the files give each row's axis.
        min_score_gap: rows with a smaller or unknown score gap are left out, see `score_gap_of`. None: all rows.
        limit: largest number of rows. None: all.
        license: licence of rows for which the source names none.
        columns: names of columns that the source knows, by the dataset's own names.
        media_dir: folder of the images that rows name. None: the dataset's folder.
        input_hash: hash of the files that decide the rows. None: that of `dpo_mm.sources.input_files`.
        overwrite: remove an earlier import in the folder first, if its files are unchanged.

    Raises:
        ValueError: if the source, axis or path is unknown, a file or row is not readable, no row remains, or the folder has
            other files, another import, or the import of files that have changed.
    """
    entry = _entry(source, axis)
    path = entry.hub if path == "hub" else path
    if not path:
        raise ValueError(f"source {source!r} has no dataset on the hub. Give a folder, a file or a hub id")
    origin = origin_of(source, path, split=split, axis=axis)
    media = media_folder(origin, media_dir)  # before the output is created
    if columns:
        check_columns(first_rows(origin), columns, path)
    folders = [Path(name) for name in (path, media_dir) if name and Path(name).is_dir()]
    settings = {
        "source": source, "path": path, "split": split, "axis": axis, "min_score_gap": min_score_gap, "limit": limit,
        "license": license, "columns": dict(columns) if columns else None, "media_dir": media_dir,
        INPUT_HASH: input_hash or input_files.input_hash(origin, media, folders),
    }  # fmt: skip
    folder = Path(output)
    with open_import(folder, settings, inputs=[path, media_dir or ""], overwrite=overwrite) as state:
        if not state.complete:
            _write_rows(entry, origin, state, folder)
    if state.rows == 0:
        raise ValueError(f"{path}: no row was imported {_why_none(state)}")
    return ImportResult(folder, state.rows, len(state.shards), state.preferences, state.left_out, state.examples)


def _why_none(state: ImportState) -> str:
    """Say why an import has no rows, and where the first missing image was looked for."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in state.left_out.items()) or "the dataset has none"
    first = state.examples.get(MISSING)
    hint = f". The first is {first}. Give the folder of the images with --media-dir" if first else ""
    return f"({reasons}){hint}"


def origin_of(source: str, path: str, *, split: str, axis: str | None = None) -> Origin:
    """Find the raw rows of a source. Raises ValueError if there are none."""
    entry = SOURCES[source]
    if entry.find_images is not None and Path(path).is_dir():
        return entry.find_images(Path(path), split)
    patterns = (entry.files[axis],) if axis in entry.files else tuple(entry.files.values())
    return find_origin(path, split=split, patterns=patterns, whole=entry.whole)


def media_folder(origin: Origin, media_dir: str | None) -> Path:
    """Return the folder of the images that rows name. Raises ValueError if it does not exist."""
    if media_dir is None:
        return origin.folder
    if not Path(media_dir).is_dir():
        raise ValueError(f"media_dir {media_dir}: no such folder. Give the folder of the images that the rows name")
    if origin.read_image is not None:
        raise ValueError(f"media_dir is for tables with paths, and {origin.folder} is a folder of images. Remove it")
    return Path(media_dir)


def _write_rows(entry: Source, origin: Origin, state: ImportState, folder: Path) -> None:
    """Write the remaining rows of an import, and update its state."""
    from datasets import List, Value

    limit, source = state.settings["limit"], state.settings["source"]
    first = first_rows(origin) if source in WITH_LISTS else []
    first = list(rename_columns(first, state.settings.get("columns") or {}))
    with_captions = _has_list(first, fine_tuning_sets.CAPTIONS)
    several_sources = _has_list(first, ("image_source",))
    captions_and_sources = {"with_captions": with_captions, "several_sources": several_sources}
    finish = _row_finisher(entry, origin, state.settings, folder, **captions_and_sources)
    total = limit if limit is not None else None if entry.grouped else count_rows(origin)
    features = response_preference()
    if entry.kind == "images":
        features = image_preference(several_sources=several_sources)
    if with_captions:
        features[CAPTIONS] = List(Value("string"))
    saved = lambda: f"{state.rows:,} rows are in {folder}" if state.rows else ""
    with stop_on_signal(saved), progress_bar(f"importing {source}", total) as advance:
        advance(state.units)
        units = _convert(entry, origin, state.settings, state.units)
        write_shards(units, folder, features, state, limit=limit, finish=finish, advance=advance)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def _has_list(rows: Sequence[Row], columns: Sequence[str]) -> bool:
    """Return True if one of the rows has a list in one of the columns."""
    return any(isinstance(row.get(name), list) for row in rows for name in columns)


def _entry(source: str, axis: str | None) -> Source:
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is unknown; {did_you_mean(source, SOURCES)}")
    entry = SOURCES[source]
    if axis is not None and axis not in entry.axes:
        raise ValueError(f"source {source!r} has no axis {axis!r}. It has {', '.join(entry.axes)}")
    return entry


def _convert(entry: Source, origin: Origin, settings: Mapping[str, Any], done: int) -> Iterator[list[Item]]:
    """Yield the items of each raw row that is not done. If rows are grouped, yield single items."""
    axis, columns = settings["axis"], settings.get("columns") or {}
    if entry.grouped:
        rows = rename_columns(raw_rows(origin), columns)
        yield from ([item] for item in islice(entry.convert(rows, axis), done, None))
        return
    for row in rename_columns(raw_rows(origin, start=done), columns):
        with name_raw_row(row):
            items = list(entry.convert([row], axis))
        name = row[ORIGIN]
        yield [item._replace(where=name) if isinstance(item, LeftOut) else {**item, ORIGIN: name} for item in items]


def _row_finisher(
    entry: Source,
    origin: Origin,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    with_captions: bool,
    several_sources: bool,
) -> Callable[[Row], Item]:
    """Build the function that completes a converted row with images, source, licence and id."""
    files, split = ImageFiles(media_folder(origin, settings.get("media_dir")), folder / SCRATCH), origin.split
    source, license, min_score_gap = (settings[name] for name in ("source", "license", "min_score_gap"))

    def finish(row: Row) -> Item:
        with name_row(row_name(row), FIX):
            gap = score_gap_of(row)
            if with_captions and isinstance(row.get("prompt"), list):
                row = {**row, **split_captions(row["prompt"])}
            if entry.kind == "images" and not isinstance(row.get("prompt"), str):
                raise ValueError(f"prompt is {row.get('prompt')!r:.80}. Expected text")
            if isinstance(row.get("image_source"), list) and not several_sources:
                raise ValueError(
                    "image_source is a list, and that of the first rows is not. Expected lists in all rows"
                )
        if min_score_gap is not None and (gap is None or gap < min_score_gap):
            return LeftOut(f"its score gap is {'unknown' if gap is None else f'below {min_score_gap:g}'}")
        row = {**row, "source": row.get("source") or source, "license": row.get("license") or license or entry.license}
        row["id"] = row["id"] if entry.keeps_ids else f"{source}-{split}-{row['id']}"
        try:
            for column in ("image_a", "image_b"):
                if entry.kind == "images" and column in row:  # a row with one image has no image_b
                    row[column] = _load_image(row[column], files)
            if row.get("image_source"):
                sources = [_load_image(cell, files) for cell in source_cells(row)]
                row["image_source"] = source_column(sources, several=several_sources)
            if entry.kind == "responses":
                row["images"] = [_load_image(cell, files) for cell in row.get("images") or []]
        except NoImageError as error:
            return LeftOut(error.reason, f"{row_name(row)}: {error.file}" if error.file else row_name(row))
        return row

    return finish


def score_gap_of(row: Row) -> float | None:
    """Return how much better the chosen side of a row is, 0 or more.

    It is the column `score_gap`, else the difference of the scores, else |2p - 1| of `p_a`, else None.
    """
    if row.get("score_gap") is not None:
        return abs(float(row["score_gap"]))
    if row.get("score_a") is not None and row.get("score_b") is not None:
        return abs(row["score_a"] - row["score_b"])
    return None if row.get("p_a") is None else abs(2 * row["p_a"] - 1)


class NoImageError(Exception):
    """An image that cannot be loaded.

    Args:
        reason: why, without its name.
        file: the path that was looked for. "" if it has none.
    """

    def __init__(self, reason: str, file: str) -> None:
        super().__init__(reason)
        self.reason, self.file = reason, file


def _load_image(cell: Any, files: ImageFiles) -> dict[str, Any]:
    """Load an image cell as bytes and file name. Raises NoImageError if there is no image."""
    try:
        return _read_image(cell, files)
    except FileNotFoundError as error:
        path = cell.get("path") if isinstance(cell, dict) else cell
        file = ""
        if isinstance(path, str) and 0 < len(path) <= LONGEST_PATH and not re.match(r"data:|\w+://", path):
            file = str(files.folder / path.lstrip("/"))
        raise NoImageError(MISSING if error.errno else str(error), file) from error


def _read_image(cell: Any, files: ImageFiles) -> dict[str, Any]:
    """Read an image cell as bytes and file name. FileNotFoundError has the reason if there is no image."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    name = Path(path).name or None if isinstance(path, str) and isinstance(cell, dict) else None
    if isinstance(data, bytes) and data:
        return {"bytes": data, "path": name}
    for text in (data, path):
        if isinstance(text, str) and text.startswith("data:"):
            return {"bytes": _data_uri_bytes(text), "path": None}
        if isinstance(text, str) and (decoded := _base64_bytes(text)):
            return {"bytes": decoded, "path": None}
    if not isinstance(path, str) or not path:
        raise FileNotFoundError("an image is empty" if not path else "an image is neither a file nor a path")
    stored = files.read(path)
    if not stored:
        raise FileNotFoundError("an image is empty")
    if not has_image_signature(stored):
        raise FileNotFoundError("an image is a file of another kind")
    return {"bytes": stored, "path": Path(path).name}


def _base64_bytes(text: str) -> bytes | None:
    """Return the image that a text in base64 contains, or None if it contains none."""
    if len(text) < SHORTEST_BASE64:
        return None
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
    return data if has_image_signature(data) else None


def _data_uri_bytes(uri: str) -> bytes:
    """Bytes of a base64 data URI. FileNotFoundError has the reason if it does not decode."""
    header, _, data = uri.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError(header)
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise FileNotFoundError("the data URI of an image does not decode") from error
