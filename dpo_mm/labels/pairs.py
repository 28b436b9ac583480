"""Pairs to label: a preference dataset, or a folder with two or more subfolders of images with the same names.

    samples/base/0001.png    samples/tuned/0001.png    samples/0001.txt

The id of a folder's pair is the name of its images, followed by the names of the two subfolders if there are more than
two. The prompt is in a text file of that name, in the folder or in one of the subfolders. Without a text file the name
itself is the prompt, with dashes and underscores replaced by spaces.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import resolve_asset
from dpo_mm.data.image_files import image_bytes
from dpo_mm.data.row_paths import MARK, is_regular
from dpo_mm.data.schema import image_preference
from dpo_mm.data.text_files import read_lines, table_suffix
from dpo_mm.sources.local_pairs import load_image_pairs
from dpo_mm.sources.raw_rows import IMAGE_SUFFIXES

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
    rows = load_image_pairs(path) if is_dataset and not _has_image_subfolders(folder) else _rows_of_folder(folder)
    counts = Counter(rows["id"])
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


def _has_image_subfolders(folder: Path) -> bool:
    """Return True if the folder has two or more subfolders and all of them contain images."""
    subfolders = _subfolders(folder) if folder.is_dir() else []
    return len(subfolders) >= 2 and all(any(map(_is_image, subfolder.iterdir())) for subfolder in subfolders)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))


def _rows_of_folder(folder: Path) -> Dataset:
    """Pair every image of one subfolder with the images of the same name in the others."""
    from datasets import Dataset

    subfolders = _subfolders(folder)
    if len(subfolders) < 2:
        raise ValueError(
            f"{folder}: has {len(subfolders)} subfolders and no *.parquet. Expected two or more subfolders with images of "
            "the same names, such as base/ and tuned/"
        )
    files = {
        subfolder.name: {file.stem: file for file in sorted(subfolder.iterdir()) if _is_image(file)}
        for subfolder in subfolders
    }
    first = subfolders[0].name
    for other in subfolders[1:]:
        unmatched = sorted(files[first].keys() ^ files[other.name].keys())
        if unmatched or not files[first]:
            reason = f"{unmatched[0]!r} is only in one of them" if unmatched else "there are no images"
            raise ValueError(f"{folder}: {first}/ and {other.name}/ do not have the same images ({reason})")
    rows = [
        {column: None for column in image_preference()}
        | {
            "id": name if len(subfolders) == 2 else f"{name}--{a}--{b}",
            "prompt": _prompt(name, (folder, *subfolders)),
            "image_a": {"bytes": None, "path": _marked(files[a][name], folder)},
            "image_b": {"bytes": None, "path": _marked(files[b][name], folder)},
            "model_a": a,
            "model_b": b,
        }
        for name in files[first]
        for a, b in combinations(files, 2)
    ]
    return Dataset.from_list(rows, features=image_preference())


def _marked(file: Path, folder: Path) -> str:
    """Return the path of an image so that only a file of the folder is opened."""
    return f"{folder.absolute()}{MARK}{file.relative_to(folder)}"


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def _prompt(name: str, folders: tuple[Path, ...]) -> str:
    for folder in folders:
        file = folder / f"{name}.txt"
        if is_regular(file, folders[0]):
            return "\n".join(read_lines(file)).strip()
    return name.replace("_", " ").replace("-", " ")


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
