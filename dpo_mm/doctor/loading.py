"""Datasets read in batches of rows with undecoded images, so that memory use does not grow with the dataset."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.assets import resolve_asset
from dpo_mm.data.load_pairs import undecoded_rows
from dpo_mm.data.parquet import open_parquet
from dpo_mm.data.row_files import parquet_files
from dpo_mm.data.row_paths import confine_row
from dpo_mm.data.row_sides import row_with_sides
from dpo_mm.data.schema import REQUIRED, load_pairs, load_responses
from dpo_mm.errors import name_row

BATCH = 32
Row = dict[str, Any]


class LoadedDataset(NamedTuple):
    """A dataset opened for reading.

    Args:
        name: as passed to `load_dataset`.
        kind: images or responses.
        num_rows: number of rows.
        files: Parquet files. Empty if the dataset was opened by the library datasets.
        arrow_dataset: the `datasets.Dataset`, if there are no files.
    """

    name: str
    kind: str
    num_rows: int
    files: tuple[Path, ...]
    arrow_dataset: Any = None


def load_dataset(name: str, *, path: str | None = None) -> LoadedDataset:
    """Open a preference dataset without reading its rows.

    Args:
        name: a Parquet file, a folder of them, a bundled dataset, a dataset saved by `datasets`, or a hub id.
        path: the same dataset in the row schema, if it has another one. `name` is then only for errors.

    Raises:
        ValueError: if the dataset cannot be read, is empty, or has other columns. The error names the dataset.
    """
    import pyarrow as pa

    local = Path(path or resolve_asset(name))
    files = (local,) if local.is_file() else tuple(parquet_files(local)) if local.is_dir() else ()
    if not files:
        return _load_with_datasets(name)
    try:
        tables = [open_parquet(file) for file in files]
    except pa.ArrowException as error:
        raise ValueError(f"{name}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
    kind = _kind_of_columns(name, tables[0].schema_arrow.names)
    num_rows = sum(table.metadata.num_rows for table in tables)
    if num_rows == 0:
        raise ValueError(f"{name}: the dataset is empty. Expected at least one pair.")
    return LoadedDataset(name, kind, num_rows, files)


def _kind_of_columns(name: str, columns: list[str]) -> str:
    columns = list(row_with_sides(dict.fromkeys(columns)))
    if all(column in columns for column in REQUIRED):
        return "images"
    if all(column in columns for column in ("prompt", "chosen", "rejected")):
        return "responses"
    raise ValueError(
        f"{name}: has columns {', '.join(columns)}. Expected {', '.join(REQUIRED)}, or prompt, chosen, rejected. "
        "dpo-mm import writes them from other formats."
    )


def _load_with_datasets(name: str) -> LoadedDataset:
    try:
        rows = load_pairs(name)
    except ValueError as error:
        if "is missing" not in str(error):
            raise
        rows = load_responses(name)
    kind = _kind_of_columns(name, rows.column_names)
    return LoadedDataset(name, kind, len(rows), (), rows)


def batches(dataset: LoadedDataset) -> Iterator[list[Row]]:
    """Yield the rows in order, in lists of at most BATCH. A row without an id gets its row number as id."""
    number = 0
    if dataset.files:
        parts = (_rows(part, file) for file in dataset.files for part in open_parquet(file).iter_batches(BATCH))
    else:
        stored = undecoded_rows(dataset.arrow_dataset)
        parts = ([dict(row) for row in islice(stored, BATCH)] for _ in range(0, dataset.num_rows, BATCH))
    for rows in parts:
        for row in rows:
            row["id"] = str(number if row.get("id") is None else row["id"])
            number += 1
        yield rows


def _rows(part: Any, file: Path) -> list[Row]:
    with name_row(str(file), "Write the file again"):
        return [row_with_sides(confine_row(row, file.parent)) for row in part.to_pylist()]


def rows_by_id(dataset: LoadedDataset, ids: set[str]) -> dict[str, Row]:
    """Return the rows with these ids. Only the Parquet row groups that contain one are read in full."""
    if not dataset.files:
        return {row["id"]: row for rows in batches(dataset) for row in rows if row["id"] in ids}
    selected: dict[str, Row] = {}
    number = 0
    for file in dataset.files:
        table = open_parquet(file)
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            has_ids = "id" in table.schema_arrow.names
            cells = table.read_row_group(group, ["id"])["id"].to_pylist() if has_ids else [None] * count
            group_ids = [str(number + n if cell is None else cell) for n, cell in enumerate(cells)]
            number += count
            if ids.isdisjoint(group_ids):
                continue
            rows = (
                row_with_sides(confine_row(row, file.parent))
                for batch in table.iter_batches(BATCH, row_groups=[group])
                for row in batch.to_pylist()
            )
            selected |= {row_id: row for row_id, row in zip(group_ids, rows, strict=True) if row_id in ids}
    return selected
