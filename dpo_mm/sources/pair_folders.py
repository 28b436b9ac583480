"""Pairs of images in two folders with the same file names: the better images in one, the worse ones in the other.

mine/better/cat.png    mine/worse/cat.png    mine/better/cat.txt
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dpo_mm.data.row_paths import check_regular
from dpo_mm.data.text_files import read_text
from dpo_mm.errors import RowError
from dpo_mm.sources.fine_tuning_sets import CAPTIONS
from dpo_mm.sources.image_pair_sets import group_of
from dpo_mm.sources.parquet_writer import Item, Row
from dpo_mm.sources.raw_rows import CAPTION_TABLES, Origin, images_below, raw_rows, split_folder

TWO_FOLDERS = (("better", "worse"), ("chosen", "rejected"))
KOHYA_FOLDERS = (("w", "l"),)
CAPTION_SUFFIXES = (".txt", ".caption")


class FolderPair(NamedTuple):
    """A folder of better images and the folder of worse ones next to it."""

    better: Path
    worse: Path

    @property
    def names(self) -> str:
        """Both names, as in better/worse."""
        return f"{self.better.name}/{self.worse.name}"


class Counterpart(NamedTuple):
    """The worse image of a better one, the folders of both, and the name that they share."""

    worse: Path
    folders: FolderPair
    name: Path


def folder_pairs(folder: Path, split: str, names: tuple[tuple[str, str], ...]) -> list[FolderPair]:
    """Find the two folders of each name in a folder or, for kohya's names, also one level below it.

    Raises:
        ValueError: if a folder has one of the two.
    """
    folder = split_folder(folder, split)
    parents = [folder]
    if names == KOHYA_FOLDERS:
        parents += sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    pairs = []
    for parent in parents:
        for name, other in names:
            has = [(parent / part).is_dir() for part in (name, other)]
            if all(has):
                pairs.append(FolderPair(parent / name, parent / other))
            elif any(has):
                present, missing = (name, other) if has[0] else (other, name)
                if images_below(parent / present):
                    raise ValueError(
                        f"{parent}: has {present}/ and no {missing}/. Expected both, with images of the same names"
                    )
    return pairs


def find_two_folders(folder: Path, split: str) -> Origin:
    """Find the pairs in the folders better/ and worse/, or chosen/ and rejected/. Raises ValueError as `_find`."""
    return _find(folder, split, TWO_FOLDERS)


def find_kohya_folders(folder: Path, split: str) -> Origin:
    """Find the pairs in the folders w/ and l/ of a folder or of its subfolders. Raises ValueError as `_find`."""
    return _find(folder, split, KOHYA_FOLDERS)


def _find(folder: Path, split: str, names: tuple[tuple[str, str], ...]) -> Origin:
    """Find the pairs of a folder.

    Raises:
        ValueError: if there are no two folders, or an image has no counterpart. The error names the first.
    """
    pairs = folder_pairs(folder, split, names)
    if not pairs:
        expected = " or ".join(f"{better}/ and {worse}/" for better, worse in names)
        has = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: no {expected} in this folder (it contains {has})")
    folder = split_folder(folder, split)
    images: dict[Path, Counterpart] = {}
    captions: dict[str, str] = {}
    for pair in pairs:
        images |= _counterparts(pair)
        for place in {folder, pair.better.parent, pair.better, pair.worse}:
            captions |= _captions(place, folder)
    read = functools.partial(_pair_row, folder=folder, images=images, captions=captions)
    return Origin(folder, tuple(images), split=split, read_image=read)


def _counterparts(pair: FolderPair) -> dict[Path, Counterpart]:
    """Counterpart of each better image: the worse one that has the same path without its suffix."""
    sides: list[dict[Path, Path]] = []
    for side in pair:
        files: dict[Path, Path] = {}
        for file in images_below(side):
            name = file.relative_to(side).with_suffix("")
            if name in files:
                raise ValueError(f"{side}: has {files[name].name} and {file.name}. Expected one image of each name")
            files[name] = check_regular(file, side.parent)
        sides.append(files)
    better, worse = sides
    for side, other, have, lack in ((pair.better, pair.worse, better, worse), (pair.worse, pair.better, worse, better)):
        if missing := sorted(have.keys() - lack.keys()):
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{side.parent}: {other.name}/ has no image {missing[0].as_posix()!r}, which {side.name}/ has{more}. Expected the "
                "same names in both"
            )
    if not better:
        raise ValueError(f"{pair.better.parent}: {pair.better.name}/ and {pair.worse.name}/ have no images")
    return {
        better[name]: Counterpart(worse[name], pair, better[name].relative_to(pair.better)) for name in sorted(better)
    }


def _captions(place: Path, folder: Path) -> dict[str, str]:
    """Captions in a table of CAPTION_TABLES, by path within the folder. The table's file_name is relative to its place."""
    captions: dict[str, str] = {}
    table = next((place / name for name in CAPTION_TABLES if (place / name).exists()), None)
    for row in raw_rows(Origin(place, (check_regular(table, folder),))) if table else ():
        text = next((row[name] for name in CAPTIONS if isinstance(row.get(name), str)), None)
        if isinstance(row.get("file_name"), str) and text:
            captions[(place / row["file_name"]).relative_to(folder).as_posix()] = text
    return captions


def _pair_row(file: Path, *, folder: Path, images: Mapping[Path, Counterpart], captions: Mapping[str, str]) -> Row:
    """Row of a better image, with its counterpart and its prompt.

    Raises:
        RowError: if it has no prompt, or two different ones.
    """
    worse, folders, name = images[file]
    above = folders.better.parent / name  # a caption next to the two folders
    inside = {path.relative_to(folder).as_posix() for path in (file, worse, above)}
    texts = {captions[path].strip() for path in inside if path in captions}
    caption_files = [place.with_suffix(suffix) for place in (file, worse, above) for suffix in CAPTION_SUFFIXES]
    caption_files = [caption for caption in caption_files if caption.exists()]
    texts |= {read_text(check_regular(caption, folder)).strip() for caption in caption_files}
    texts.discard("")
    if not texts and caption_files:
        raise RowError(f"{caption_files[0]}: no prompt. Write it into the file, or remove the pair")
    if not texts:
        raise RowError(
            f"{file}: no prompt. Expected a text file {file.with_suffix('.txt').name} next to it, or {CAPTION_TABLES[0]} with "
            "file_name and text"
        )
    if len(texts) > 1:
        one, two = sorted(texts)[:2]
        raise RowError(f"{file}: two prompts, {one[:40]!r} and {two[:40]!r}. A pair has one prompt. Make them the same")
    return {
        "id": above.relative_to(folder).as_posix(),
        "prompt": texts.pop(),
        "better": file.relative_to(folder).as_posix(),
        "worse": worse.relative_to(folder).as_posix(),
    }


def image_pairs(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert rows of `id, prompt, better, worse`: the first image wins."""
    for row in rows:
        yield {
            "id": row["id"],
            "prompt": row["prompt"],
            "image_a": row["better"],
            "image_b": row["worse"],
            "preference": "a",
            "group_id": group_of(row["prompt"]),
        }
