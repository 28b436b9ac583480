"""Pairs of images from a folder with two or more subfolders, one per model. The images have the same names.

    samples/base/0001.png    samples/tuned/0001.png    samples/0001.txt    samples/0001.png

An image of that name in the folder itself is the image to edit, and 0001.2.png, 0001.3.png and so on are further ones. The id of a pair is the name of its images, followed by the
names of the two subfolders if there are more than two. The prompt is in a text file of that name, in the folder or in one of
the subfolders. Without a text file the name itself is the prompt, with dashes and underscores replaced by spaces. Each folder
is listed once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.data.image_files import IMAGE_SUFFIXES
from dpo_mm.data.lazy_images import source_column
from dpo_mm.data.row_paths import MARK, is_regular
from dpo_mm.data.schema import image_preference
from dpo_mm.data.text_files import read_lines

if TYPE_CHECKING:
    from datasets import Dataset


def has_image_subfolders(folder: Path) -> bool:
    """Return True if the folder has two or more subfolders and all of them contain images."""
    folders = _subfolders(folder) if folder.is_dir() else []
    return len(folders) >= 2 and all(any(map(_is_image, os.listdir(part))) for part in folders)


def rows_of_folder(folder: Path) -> Dataset:
    """Pair every image of one subfolder with the images of the same name in the others.

    Raises:
        ValueError: if there are fewer than two subfolders, or they do not have the same images.
    """
    import pyarrow as pa
    from datasets import Dataset

    subfolders = _subfolders(folder)
    if len(subfolders) < 2:
        raise ValueError(
            f"{folder}: has {len(subfolders)} subfolders and no *.parquet. Expected two or more subfolders with images of "
            "the same names, such as base/ and tuned/"
        )
    files = {part.name: _stems(name for name in os.listdir(part) if _is_image(name)) for part in subfolders}
    first = subfolders[0].name
    for other in subfolders[1:]:
        unmatched = sorted(files[first].keys() ^ files[other.name].keys())
        if unmatched or not files[first]:
            reason = f"{unmatched[0]!r} is only in one of them" if unmatched else "there are no images"
            raise ValueError(f"{folder}: {first}/ and {other.name}/ do not have the same images ({reason})")
    prompts = _prompts(files[first], (folder, *subfolders))
    sources = _stems(name for name in os.listdir(folder) if _is_image(name) and is_regular(folder / name, folder))
    edited = {name: _sources_of(name, sources) for name in files[first]}
    several = any(len(own) > 1 for own in edited.values())
    pairs = [(name, a, b) for name in files[first] for a, b in combinations(files, 2)]
    marked = f"{folder.absolute()}{MARK}"
    columns = {
        "id": [name if len(subfolders) == 2 else f"{name}--{a}--{b}" for name, a, b in pairs],
        "prompt": [prompts[name] for name, _, _ in pairs],
        "image_source": [
            source_column([{"bytes": None, "path": f"{marked}{file}"} for file in edited[name]], several=several)
            for name, _, _ in pairs
        ],
        "image_a": [{"bytes": None, "path": f"{marked}{a}/{files[a][name]}"} for name, a, _ in pairs],
        "image_b": [{"bytes": None, "path": f"{marked}{b}/{files[b][name]}"} for name, _, b in pairs],
        "model_a": [a for _, a, _ in pairs],
        "model_b": [b for _, _, b in pairs],
    }
    schema = image_preference(several_sources=several).arrow_schema
    nothing = {name: pa.nulls(len(pairs), schema.field(name).type) for name in schema.names if name not in columns}
    values: dict[str, Any] = {**columns, **nothing}
    return Dataset(pa.table({name: values[name] for name in schema.names}, schema=schema))


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _stems(names: Any) -> dict[str, str]:
    """Return file names by their names without suffix, sorted."""
    return {name[: name.rfind(".")]: name for name in sorted(names)}


def _sources_of(name: str, files: Mapping[str, str]) -> list[str]:
    """Return the files of the images to edit of a name, in order."""
    sources = [files[name]] if name in files else []
    while sources and (further := f"{name}.{len(sources) + 1}") in files:
        sources.append(files[further])
    return sources


def _prompts(names: Mapping[str, str], folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the prompt of each name: the first text file in one of the folders, or the name."""
    prompts: dict[str, str] = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            texts = {e.name[:-4]: e.is_symlink() for e in entries if e.name.endswith(".txt")}
        is_inside = not folder.is_symlink()
        for name in texts.keys() & names.keys() - prompts.keys():
            file = folder / f"{name}.txt"
            if (is_inside and not texts[name] and file.is_file()) or is_regular(file, folders[0]):
                prompts[name] = _text(file)
    return {name: prompts.get(name, name.replace("_", " ").replace("-", " ")) for name in names}


def _text(file: Path) -> str:
    """Return the text of a prompt. Plain ASCII, the usual case, takes no detection of its encoding."""
    data = file.read_bytes()
    text = data.decode() if data.isascii() else "\n".join(read_lines(file))
    return text.replace("\r\n", "\n").strip()
