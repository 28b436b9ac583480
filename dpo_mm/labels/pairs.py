"""Pairs to label: a preference dataset, or a folder with two or more subfolders of images with the same names."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import resolve_asset
from dpo_mm.data.image_files import image_bytes
from dpo_mm.data.text_files import table_suffix
from dpo_mm.labels.model_folders import has_image_subfolders, rows_of_folder
from dpo_mm.sources.local_pairs import load_image_pairs

if TYPE_CHECKING:
    from datasets import Dataset


def open_pairs(path: str) -> Dataset:
    """Open the pairs of a dataset or folder as `ImagePreference` rows with undecoded images.

    Args:
        path: a preference dataset, as `local_pairs` takes it, or a folder of subfolders of images. The preference of a
            folder's rows is null.

    Raises:
        ValueError: if it cannot be read or two rows share an id. The error names the dataset or folder and the fix.
    """
    from datasets import Image

    folder = Path(resolve_asset(path))
    is_dataset = not folder.is_dir() or any(map(_is_table, folder.iterdir())) or (folder / "state.json").exists()
    rows = load_image_pairs(path) if is_dataset and not has_image_subfolders(folder) else rows_of_folder(folder)
    counts = Counter(rows["id"][:])  # a slice reads a column at once, and iteration row by row
    if len(counts) < len(rows):
        repeated = next(pair for pair, count in counts.items() if count > 1)
        raise ValueError(
            f"{path}: several rows have the id {repeated!r}. Votes are stored by id, so ids must be unique"
        )
    for column in ("image_a", "image_b"):
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def _is_table(file: Path) -> bool:
    return table_suffix(file) in (".parquet", ".csv", ".jsonl") and not file.name.startswith(".")


def file_bytes(cell: dict[str, Any]) -> bytes:
    """Return the file of an undecoded image. An empty file is returned as empty bytes.

    Raises:
        ValueError: if the path leads to anything but an image of the dataset.
        OSError: if the file no longer exists.
    """
    return b"" if cell["bytes"] == b"" else image_bytes(cell)


def _bytes_or_empty(cell: dict[str, Any]) -> bytes:
    try:
        return file_bytes(cell)
    except (OSError, ValueError):
        return b""


def pair_digest(row: dict[str, Any]) -> str:
    """Return a hash of the prompt and both image files, which detects a pair that changed after a vote.

    An image that cannot be read counts as empty: the page shows that, and the pair can be skipped.
    """
    parts = (row["prompt"].encode(), _bytes_or_empty(row["image_a"]), _bytes_or_empty(row["image_b"]))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
