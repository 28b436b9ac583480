"""Encoded rows with the features of a frozen vision tower instead of pixels: computed once, on disk, read when they are used.

A row of a real model takes some MiB. Nothing is decoded or encoded in the steps, because a shard has whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_mm.config import TrainConfig
from dpo_mm.data.load_pairs import UndecodableImageError
from dpo_mm.files.cache_folder import create_cache
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.training.arrow_shards import check_disk
from dpo_mm.training.dropped_rows import DroppedRows
from dpo_mm.training.pair_stream import lengths_of
from dpo_mm.training.reference_cache import frozen_output_key
from dpo_mm.training.response_rows import encoded_bytes
from dpo_mm.training.tensor_shards import read_value, write_shards

ROWS_PER_SHARD = 16


class FeatureRows:
    """Encoded rows with vision features, by number.

    Args:
        rows: encoded rows with pixels.
        paths: files with ROWS_PER_SHARD rows each.
        content_digest: the key of the features.
        dataset_name: for errors.
    """

    def __init__(self, rows: Any, paths: Sequence[Path], *, content_digest: str, dataset_name: str) -> None:
        self.rows, self.paths, self.lengths = rows, paths, lengths_of(rows)
        self.content_digest, self.dataset_name = content_digest, dataset_name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self):
            raise IndexError(number)
        row = read_value(self.paths[number // ROWS_PER_SHARD], number % ROWS_PER_SHARD)
        if isinstance(row, str):  # its image was broken when the features were computed
            raise UndecodableImageError.from_json_line(row, self.dataset_name)
        return row


def cache_vision_features(
    policy: TextPolicy, rows: Any, config: TrainConfig, cache: Path, dropped: DroppedRows
) -> FeatureRows:
    """Compute the features of rows that are not on disk yet. Several processes share the work.

    Args:
        policy: the prepared policy.
        rows: encoded rows, in memory or streamed.
        config: settings of the run.
        cache: the cache.
        dropped: receives rows with a broken image.

    Raises:
        ValueError: if the tower is trained, its features cannot be computed separately, or the disk is too small.
    """
    policy.cache_vision_features([])  # refuses a tower that trains
    key = frozen_output_key("vision features", policy, rows, policy.encoding_fingerprint())
    folder = cache / "features" / key
    with progress_bar("computing vision features", len(rows)) as advance:

        def compute(part: range) -> list[Any]:
            values: list[Any] = []
            for number in part:
                row = dropped.read(rows, number)
                values += [row] if isinstance(row, str) else policy.cache_vision_features([row])
                if number == part.start:
                    _check_disk(folder, encoded_bytes(values[0]), len(rows))
                advance(1)
            return values

        paths = write_shards(folder, len(rows), ROWS_PER_SHARD, compute)
    return FeatureRows(rows, paths, content_digest=key, dataset_name=config.pairs)


def _check_disk(folder: Path, row_bytes: int, rows: int) -> None:
    create_cache(folder)
    stored = sum(path.stat().st_size for path in folder.glob("rows-*"))
    check_disk(folder, max(row_bytes * rows - stored, 0), less="leave out cache_vision_features")
