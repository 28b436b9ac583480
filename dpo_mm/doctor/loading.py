"""A set's rows in batches, pictures undecoded, so that a set of any size passes through little memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.assets import resolve_asset
from dpo_mm.data.schema import REQUIRED, load_pairs, load_responses

BATCH = 32
Row = dict[str, Any]


class LoadedDataset(NamedTuple):
    """A set that is open: its kind (images or answers), how many rows, its Parquet files or, without, its Dataset."""

    name: str
    kind: str
    rows: int
    files: tuple[Path, ...]
    dataset: Any = None


def load_dataset(name: str) -> LoadedDataset:
    """A Parquet file, a folder of them, a shipped set, a set saved by `datasets`, or a hub id.

    Raises ValueError that names the set and what was expected.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(resolve_asset(name))
    files = (path,) if path.is_file() else tuple(sorted(path.glob("*.parquet"))) if path.is_dir() else ()
    if not files:
        return _through_datasets(name)
    try:
        tables = [pq.ParquetFile(file) for file in files]
    except pa.ArrowException as error:
        raise ValueError(f"{name}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
    kind = _kind(name, tables[0].schema_arrow.names)
    rows = sum(table.metadata.num_rows for table in tables)
    if rows == 0:
        raise ValueError(f"{name}: the set is empty; expected at least one pair")
    return LoadedDataset(name, kind, rows, files)


def _kind(name: str, columns: list[str]) -> str:
    if all(column in columns for column in REQUIRED):
        return "images"
    if all(column in columns for column in ("prompt", "chosen", "rejected")):
        return "answers"
    raise ValueError(
        f"{name}: has columns {', '.join(columns)}; expected {', '.join(REQUIRED)}, or prompt, chosen, rejected; "
        "dpo-mm import makes them from other forms"
    )


def _through_datasets(name: str) -> LoadedDataset:
    from datasets import Image, List

    try:
        rows = load_pairs(name)
    except ValueError as error:
        if "is missing" not in str(error):
            raise
        rows = load_responses(name)
    kind = _kind(name, rows.column_names)
    for column in ("image_a", "image_b") if kind == "images" else ():
        rows = rows.cast_column(column, Image(decode=False))
    if kind == "answers" and "images" in rows.column_names:
        rows = rows.cast_column("images", List(Image(decode=False)))
    return LoadedDataset(name, kind, len(rows), (), rows)


def batches(opened: LoadedDataset) -> Iterator[list[Row]]:
    """The rows in their order, at most BATCH at once; each has an id, its number where the set gives none."""
    import pyarrow.parquet as pq

    number = 0
    if opened.files:
        parts = (part.to_pylist() for file in opened.files for part in pq.ParquetFile(file).iter_batches(BATCH))
    else:
        parts = (
            [opened.dataset[n] for n in range(start, min(start + BATCH, opened.rows))]
            for start in range(0, opened.rows, BATCH)
        )
    for rows in parts:
        for row in rows:
            row["id"] = str(number if row.get("id") is None else row["id"])
            number += 1
        yield rows


def rows_called(opened: LoadedDataset, ids: set[str]) -> dict[str, Row]:
    """Rows by their ids; of Parquet only the groups that hold one are read."""
    import pyarrow.parquet as pq

    if not opened.files:
        return {row["id"]: row for rows in batches(opened) for row in rows if row["id"] in ids}
    found: dict[str, Row] = {}
    number = 0
    for table in map(pq.ParquetFile, opened.files):
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            named = "id" in table.schema_arrow.names
            names = table.read_row_group(group, ["id"])["id"].to_pylist() if named else [None] * count
            names = [str(number + n if name is None else name) for n, name in enumerate(names)]
            number += count
            if ids.isdisjoint(names):
                continue
            rows = (row for batch in table.iter_batches(BATCH, row_groups=[group]) for row in batch.to_pylist())
            found |= {name: row for name, row in zip(names, rows, strict=True) if name in ids}
    return found
