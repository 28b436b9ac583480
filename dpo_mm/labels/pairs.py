"""Pairs to label: a preference set, or a folder with two or more folders of pictures of the same names.

    samples/base/0001.png    samples/tuned/0001.png    samples/0001.txt

A folder's pair is called by its pictures' name, with those of its sides where there are more than two. Its prompt stands
in a text file of that name, beside the folders or within one of them; without one the name itself is the prompt, dashes and underscores as spaces.
"""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import resolve_asset
from dpo_mm.data.image_files import image_bytes
from dpo_mm.data.schema import image_preference, load_pairs

if TYPE_CHECKING:
    from datasets import Dataset

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def open_pairs(path: str) -> Dataset:
    """The pairs of a set or folder as `ImagePreference` rows, pictures undecoded; a folder's preference is null.

    Raises ValueError that names the set or folder, what was expected and the fix.
    """
    from datasets import Image

    folder = Path(resolve_asset(path))
    is_set = not folder.is_dir() or any(folder.glob("*.parquet")) or (folder / "state.json").exists()
    rows = load_pairs(path) if is_set and not _holds_pictures(folder) else _from_folder(folder)
    ids = rows["id"]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if list(ids).count(name) > 1)
        raise ValueError(f"{path}: id {twice!r} stands twice; votes are kept by id, give every pair its own")
    for column in ("image_a", "image_b"):
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def _holds_pictures(folder: Path) -> bool:
    """Whether there are folders of pictures, whatever stands beside them."""
    sides = _sides(folder) if folder.is_dir() else []
    return len(sides) >= 2 and all(any(map(_is_picture, side.iterdir())) for side in sides)


def _sides(folder: Path) -> list[Path]:
    return sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))


def _from_folder(folder: Path) -> Dataset:
    """Every picture of one folder with that of the same name in each other."""
    from datasets import Dataset

    sides = _sides(folder)
    if len(sides) < 2:
        raise ValueError(
            f"{folder}: has {len(sides)} folders; expected two or more of the same pictures' names, such as base/ and "
            "tuned/, or *.parquet"
        )
    files = {side.name: {file.stem: file for file in sorted(side.iterdir()) if _is_picture(file)} for side in sides}
    first = sides[0].name
    for side in sides[1:]:
        odd = sorted(files[first].keys() ^ files[side.name].keys())
        if odd or not files[first]:
            what = f"{odd[0]!r} is in one of them only" if odd else "there are no pictures"
            raise ValueError(f"{folder}: {first}/ and {side.name}/ don't pair up ({what})")
    rows = [
        {name: None for name in image_preference()}
        | {
            "id": name if len(sides) == 2 else f"{name}--{a}--{b}",
            "prompt": _prompt(name, (folder, *sides)),
            "image_a": {"bytes": None, "path": str(files[a][name].resolve())},
            "image_b": {"bytes": None, "path": str(files[b][name].resolve())},
            "model_a": a,
            "model_b": b,
        }
        for name in files[first]
        for a, b in combinations(files, 2)
    ]
    return Dataset.from_list(rows, features=image_preference())


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and not file.name.startswith(".")


def _prompt(name: str, folders: tuple[Path, ...]) -> str:
    for folder in folders:
        file = folder / f"{name}.txt"
        if file.is_file():
            return file.read_text().strip()
    return name.replace("_", " ").replace("-", " ")


def file_of(cell: dict[str, Any]) -> bytes:
    """The file of an undecoded picture, empty where that is all there is. Raises OSError where it is gone."""
    return b"" if cell["bytes"] == b"" else image_bytes(cell)


def digest(row: dict[str, Any]) -> str:
    """A hash of what a labeller saw of a pair: prompt and both files, so that votes never meet other pictures."""
    parts = (row["prompt"].encode(), file_of(row["image_a"]), file_of(row["image_b"]))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
