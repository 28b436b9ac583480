"""From a public set, or your own, to canonical Parquet: read, convert, keep or leave out, fetch pictures, write.

What every set has in common is here once; what is its own is its converter, see `dpo_mm.sources.SOURCES`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_mm.data.schema import image_preference, response_preference
from dpo_mm.errors import did_you_mean
from dpo_mm.progress import progress_bar
from dpo_mm.sources import SOURCES, Source
from dpo_mm.sources.archives import Files
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row, resume, write
from dpo_mm.sources.raw_rows import Origin, find, raw_rows, total

SCRATCH = ".unpacked"


@dataclass(frozen=True)
class ImportResult:
    """What an import made. preferences: rows by winner, of image sets. left_out: rows by the reason."""

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
) -> ImportResult:
    """Import a set into a folder of Parquet files that `load_pairs` and `load_responses` take.

    path: a folder, a file, a hub id, or "hub" for the set's own place there. axis: one of the source's, where it has
    several. min_score_gap: rows whose sides are less apart (scores, or |2p - 1| of votes; an answer set's margin), or
    unknown, are left out. license: where the source names none. A run that was cut goes on where it was.
    Raises ValueError that names source, file, row or flag, what was expected, and the fix.
    """
    entry = _entry(source, axis)
    path = entry.hub if path == "hub" else path
    if not path:
        raise ValueError(f"source {source!r} has no place on the hub of its own; give a folder, a file or a hub id")
    patterns = (entry.files[axis],) if axis in entry.files else tuple(entry.files.values())
    origin = find(path, split=split, patterns=patterns, whole=entry.whole)
    settings = {"source": source, "path": path, "split": split, "axis": axis, "min_score_gap": min_score_gap}
    settings |= {"limit": limit, "license": license}
    folder = Path(output)
    state = resume(folder, settings)
    if not state.complete:
        finish = _finisher(entry, origin, source, license, min_score_gap, folder)
        known = limit if limit is not None else None if entry.grouped else total(origin)
        features = image_preference() if entry.kind == "images" else response_preference()
        with progress_bar(f"importing {source}", known) as advance:
            advance(state.units)
            units = _units(entry, origin, axis, state.units)
            state = write(units, folder, features, state, limit=limit, finish=finish, advance=advance)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    if state.rows == 0:
        why = "; ".join(f"{count} x {reason}" for reason, count in state.left_out.items()) or "there was none"
        raise ValueError(f"{path}: no row was kept ({why})")
    return ImportResult(folder, state.rows, len(state.shards), state.preferences, state.left_out, state.examples)


def _entry(source: str, axis: str | None) -> Source:
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is unknown; {did_you_mean(source, SOURCES)}")
    entry = SOURCES[source]
    if axis is not None and axis not in entry.axes:
        raise ValueError(f"source {source!r} has no axis {axis!r}; it has {', '.join(entry.axes)}")
    return entry


def _units(entry: Source, origin: Origin, axis: str | None, done: int) -> Iterator[list[Item]]:
    """The items of each raw row after those that are done; where rows are grouped, one item at a time."""
    row: Row = {}

    def watched() -> Iterator[Row]:
        nonlocal row
        for row in raw_rows(origin, start=0 if entry.grouped else done):  # noqa: UP028 (the name is read below)
            yield row

    try:
        if entry.grouped:
            yield from ([item] for item in islice(entry.convert(watched(), axis), done, None))
        else:
            for one in watched():
                yield list(entry.convert([one], axis))
    except KeyError as error:
        has = ", ".join(name for name in row if not name.startswith("_"))
        raise ValueError(
            f"{row.get('_file')}, row {row.get('_number')}: column {error} is missing (has {has}); "
            "is it this source's set?"
        ) from error


def _finisher(
    entry: Source, origin: Origin, source: str, license: str | None, min_score_gap: float | None, folder: Path
) -> Callable[[Row], Item]:
    """What makes a converted row whole: pictures as bytes, source and licence; or the reason to leave it out."""
    files, split = Files(origin.folder, folder / SCRATCH), origin.split

    def finish(row: Row) -> Item:
        gap = margin_of(row)
        if min_score_gap is not None and (gap is None or gap < min_score_gap):
            return LeftOut(f"margin is {'unknown' if gap is None else f'below {min_score_gap:g}'}")
        row = {**row, "source": row.get("source") or source, "license": row.get("license") or license or entry.license}
        row["id"] = row["id"] if entry.keeps_ids else f"{source}-{split}-{row['id']}"
        try:
            for column in ("image_a", "image_b"):
                if entry.kind == "images":
                    row[column] = _picture(row[column], files)
            if entry.kind == "responses":
                row["images"] = [_picture(cell, files) for cell in row.get("images") or []]
        except FileNotFoundError as error:
            return LeftOut("a picture is not there" if error.errno else str(error))
        return row

    return finish


def margin_of(row: Row) -> float | None:
    """How far a row's sides are apart, 0 or more; None where nothing says so."""
    if row.get("score_gap") is not None:
        return abs(float(row["score_gap"]))
    if row.get("score_a") is not None and row.get("score_b") is not None:
        return abs(row["score_a"] - row["score_b"])
    return None if row.get("p_a") is None else abs(2 * row["p_a"] - 1)


def _picture(cell: Any, files: Files) -> dict[str, Any]:
    """A cell as bytes and name. Raises FileNotFoundError with the reason where there are none to be had."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return {"bytes": cell["bytes"], "path": Path(cell.get("path") or "").name or None}
    if isinstance(cell, bytes) and cell:
        return {"bytes": cell, "path": None}
    path = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(path, str) or not path:
        raise FileNotFoundError("a picture is empty")
    return {"bytes": files.read(path), "path": Path(path).name}
