"""Write rows as Parquet and combine shards into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.resumable import atomic_write

if TYPE_CHECKING:
    from datasets import Dataset, Features


def write_rows(rows: list[dict[str, Any]], path: Path, *, make: Callable[..., Dataset], features: Features) -> None:
    """Rows as Parquet, written aside and renamed; a shard without pairs is an empty file of the same columns."""
    from datasets import Dataset

    found = make(rows) if rows else Dataset.from_dict({name: [] for name in features}, features=features)
    with atomic_write(path) as beside:
        found.to_parquet(str(beside))


def combine_shards(places: list[Path], target: Path, *, nothing: str) -> Path:
    """Shards as one file, once all are there. Raises ValueError with `nothing` where they hold no row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not all(place.exists() for place in places):
        return target
    table = pa.concat_tables([pq.read_table(place) for place in places])
    if table.num_rows == 0:
        raise ValueError(nothing)
    with atomic_write(target) as beside:
        pq.write_table(table, beside)
    return target
