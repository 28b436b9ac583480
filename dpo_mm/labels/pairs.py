"""Pairs to label: a preference dataset of images or responses, or a folder with a subfolder of images per model."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import resolve_asset
from dpo_mm.data.image_files import image_bytes
from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.load_pairs import has_source_lists
from dpo_mm.data.row_files import open_rows
from dpo_mm.data.schema import load_pairs
from dpo_mm.data.text_files import table_suffix
from dpo_mm.labels.model_folders import has_image_subfolders, rows_of_folder
from dpo_mm.labels.response_pairs import is_response, open_response_pairs, response_digest
from dpo_mm.sources.local_pairs import local_pairs

if TYPE_CHECKING:
    from datasets import Dataset


def open_pairs(path: str) -> Dataset:
    """Open the pairs of a dataset or folder as `ImagePreference` or `ResponsePreference` rows with undecoded images.

    Args:
        path: a preference dataset, as `local_pairs` takes it, or a folder of subfolders of images. The preference of a
            folder's rows is null.

    Raises:
        ValueError: if it cannot be read or two rows share an id. The error names the dataset or folder and the fix.
    """
    from datasets import Image, List

    folder = Path(resolve_asset(path))
    is_dataset = not folder.is_dir() or any(map(_is_table, folder.iterdir())) or (folder / "state.json").exists()
    rows = _open_dataset(path) if is_dataset and not has_image_subfolders(folder) else rows_of_folder(folder)
    counts = Counter(rows["id"][:])  # a slice reads a column at once, and iteration row by row
    if len(counts) < len(rows):
        repeated = next(pair for pair, count in counts.items() if count > 1)
        raise ValueError(
            f"{path}: several rows have the id {repeated!r}. Votes are stored by id, so ids must be unique"
        )
    for column in ("image_source", "image_a", "image_b") if "image_a" in rows.column_names else ():
        is_list = column == "image_source" and has_source_lists(rows)
        rows = rows.cast_column(column, List(Image(decode=False)) if is_list else Image(decode=False))
    return rows


def _open_dataset(path: str) -> Dataset:
    """Open a dataset of pairs of images or of responses, as its columns have it."""
    local = local_pairs(path)
    is_text = local.kind == "responses" if local.kind else _has_responses(local.path)
    return open_response_pairs(local.path, path) if is_text else load_pairs(local.path, dataset_name=path)


def _has_responses(path: str) -> bool:
    columns = open_rows(path).column_names
    return "image_a" not in columns and not {"chosen", "rejected"}.isdisjoint(columns)


def model_columns(rows: Dataset) -> tuple[str, str]:
    """Return the names of the columns with the models of a and b."""
    return ("model_a", "model_b") if "image_a" in rows.column_names else ("chosen_model", "rejected_model")


def models_of(rows: Dataset) -> dict[str, tuple[str | None, str | None]]:
    """Return the models of a and b of each pair, by pair id."""
    unknown: list[str | None] = [None] * len(rows)
    a, b = (rows[name][:] if name in rows.column_names else unknown for name in model_columns(rows))
    return dict(zip(rows["id"][:], zip(a, b, strict=True), strict=True))


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
    """Return a hash of the prompt, of images to edit and of both sides, which detects a pair that changed after a vote.

    An image that cannot be read counts as empty: the page shows that, and the pair can be skipped.
    """
    if is_response(row):
        return response_digest(row)
    cells = [row[column] for column in ("image_a", "image_b") if row[column] is not None] + source_cells(row)
    parts = (row["prompt"].encode(), *map(_bytes_or_empty, cells))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
