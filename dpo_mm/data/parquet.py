"""Write rows as Parquet, and combine shards into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.resumable import atomic_write

if TYPE_CHECKING:
    from datasets import Dataset, Features


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
    with atomic_write(path) as temporary:
        dataset.to_parquet(str(temporary))


def combine_shards(paths: list[Path], target: Path, *, nothing: str) -> Path:
    """Combine shards into one Parquet file, if all shards exist.

    Args:
        paths: the shards in order.
        target: file to write.
        nothing: error message if the shards have no rows.

    Returns:
        `target`, also if it is not written because shards are missing.

    Raises:
        ValueError: if the shards have no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not all(path.exists() for path in paths):
        return target
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    if table.num_rows == 0:
        raise ValueError(nothing)
    with atomic_write(target) as temporary:
        pq.write_table(table, temporary)
    return target
