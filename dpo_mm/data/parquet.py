"""Write rows as Parquet, and combine shards into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.errors import NoPairsError
from dpo_mm.files.checksums import write_with_checksum
from dpo_mm.files.resumable import atomic_write

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from datasets import Dataset, Features


PAGE_CHECKSUMS: dict[str, Any] = {"write_page_checksum": True}
"""Option of Parquet writers. Readers of `dpo_mm.data.schema` then notice a changed byte."""
ROW_GROUP_BYTES = 64 * 2**20
"""Largest size of a row group, about. A reader holds one in memory, and a column of one must stay below 2 GiB."""


READ_BUFFER_BYTES = 2**20


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file to read it in batches, a page at a time. Without a buffer, Arrow reads a whole row group.

    Raises:
        pyarrow.ArrowException: if the file is not Parquet.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES)


def write_rows(rows: list[dict[str, Any]], path: Path, *, make: Callable[..., Dataset], features: Features) -> None:
    """Write rows as a Parquet file, completely or not at all. A shard without rows is an empty file.

    Args:
        rows: rows as `make` takes them.
        path: file to write.
        make: function from rows to a Dataset.
        features: columns of the file if there are no rows.
    """
    from datasets import Dataset

    dataset = make(rows) if rows else Dataset.from_dict({name: [] for name in features}, features=features)
    with write_with_checksum(path) as temporary:
        rows_per_group = max(1, len(dataset) * ROW_GROUP_BYTES // max(dataset.data.nbytes, 1))
        dataset.to_parquet(str(temporary), batch_size=rows_per_group, **PAGE_CHECKSUMS)


def combine_shards(paths: list[Path], target: Path, *, empty_message: str) -> Path:
    """Combine shards into one Parquet file.

    Args:
        paths: the shards in order.
        target: file to write.
        empty_message: error message if the shards have no rows.

    Returns:
        `target`.

    Raises:
        NoPairsError: if the shards have no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(path) for path in paths]
    filled = [file for file in files if file.metadata.num_rows]
    if not filled:
        raise NoPairsError(empty_message)
    schema = pa.unify_schemas([file.schema_arrow for file in filled], promote_options="permissive")
    with atomic_write(target) as temporary, pq.ParquetWriter(temporary, schema, **PAGE_CHECKSUMS) as writer:
        for file in filled:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number).cast(schema)
                writer.write_table(
                    table, row_group_size=max(1, table.num_rows * ROW_GROUP_BYTES // max(table.nbytes, 1))
                )
    return target
