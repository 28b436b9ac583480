"""Images of a comparison on disk, with how each was generated and what each judge scored.

The folder contains PNG files, the images to edit among them, and two files of JSON lines. manifest.jsonl has one row per image: its hash, and
everything that determines its pixels. So an interrupted comparison resumes, and anyone can check an image or generate it
again later. scores.jsonl has one row per image and judge.

An image is looked up by how it was generated, not by its purpose: two steps of a comparison that need the same image
share it. A file is written to a temporary name and renamed, and its row is written after it. Anything that a killed run
left incomplete is ignored and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image

from dpo_mm.data.image_files import decode_image
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.row_paths import is_regular, read_regular_file, resolve_inside
from dpo_mm.errors import name_row
from dpo_mm.files.json_lines import append_lines, combine_parts, list_parts, own_part, read_lines, read_parts
from dpo_mm.files.outputs import remove_stale_files
from dpo_mm.files.resumable import atomic_write
from dpo_mm.process.process_rank import process_rank, wait_for_others

logger = logging.getLogger(__name__)

FOLDER, MANIFEST, SCORES = "pictures", "manifest.jsonl", "scores.jsonl"
SOURCES = "sources"
"""Subfolder of the images to edit, whose names are their hashes."""
NAMES = ("model", "revision", "adapter")
"""Names that do not identify an image. The hash of the weights does."""
POLL_S = 1.0
"""Seconds between two looks for the rows of other processes."""
COMPRESS_LEVEL = 1
"""PNG compression level: a twentieth of the best level's time, for files a tenth larger."""


class ImageFiles(Sequence[Image.Image]):
    """Image files as a sequence that decodes each image on access, so that thousands need no memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...
    def __getitem__(self, index: int | slice) -> Image.Image | ImageFiles:
        if isinstance(index, slice):
            return ImageFiles(self.files[index])
        return decode_image(read_regular_file(self.files[index]))


class ImageStore:
    """Images in a folder by how they were generated, and their scores by judge.

    Args:
        folder: created if it does not exist.

    Raises:
        ValueError: if a row of manifest.jsonl or scores.jsonl is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_files(folder.rglob(".*"))
        self.rows: dict[str, dict[str, Any]] = {}
        self.scores: dict[tuple[str, ...], float] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the rows that are on disk, those of other processes included."""
        manifest, scores = self.folder / MANIFEST, self.folder / SCORES
        self.rows |= {
            self.key(row, row["prompt"], row["seed"]): row for row in _checked_images(manifest, read_parts(manifest))
        }
        self.scores |= {
            (row["card"], row["sha256"], row["prompt"], *row.get("sources", ())): row["score"]
            for row in _checked_scores(scores, read_parts(scores))
        }

    def wait_for(self, missing: Callable[[], str | None]) -> None:
        """Wait until the other processes have made their images or scores. missing: name of one that is not in the store."""
        if process_rank().count == 1:
            return

        def look() -> str | None:
            self.refresh()
            return missing()

        wait_for_others(look, lambda: len(self.rows) + len(self.scores), poll_s=POLL_S)

    def combine(self) -> None:
        """Move the rows of all processes into one manifest and one file of scores."""
        for name in (MANIFEST, SCORES):
            combine_parts(self.folder / name)

    @staticmethod
    def key(settings: Mapping[str, Any], prompt: str, seed: int) -> str:
        """Hash the prompt, the seed and the settings that determine an image, whatever the model is called."""
        decisive = {
            name: value for name, value in settings.items() if name not in (*NAMES, "file", "sha256", "prompt", "seed")
        }
        return hashlib.sha256(json.dumps([decisive, prompt, seed], sort_keys=True).encode()).hexdigest()

    def find(self, settings: Mapping[str, Any], prompt: str, seed: int) -> Path | None:
        """Return an image's file if it exists with the hash in its row, else None."""
        row = self.rows.get(self.key(settings, prompt, seed))
        if row is None:
            return None
        path = self.folder / row["file"]
        intact = is_regular(path, self.folder) and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        return path if intact else None

    def remove(self) -> None:
        """Remove the files of the store. Files of others in its folder stay."""
        files = [self.folder / row["file"] for row in self.rows.values()]
        tables = [self.folder / MANIFEST, self.folder / SCORES]
        names = {name for row in self.rows.values() for name in row.get("sources", ())}
        files += [path for name in names if (path := source_file(self.folder, name)) is not None]
        for path in (*files, *tables, *(part for table in tables for part in list_parts(table))):
            path.unlink(missing_ok=True)
        for folder in (*{path.parent for path in files}, self.folder):
            with contextlib.suppress(OSError):  # it has files of others
                folder.rmdir()

    def add(self, settings: Mapping[str, Any], images: Iterable[tuple[str, int, Image.Image]], *, label: str) -> None:
        """Save images and their rows.

        Args:
            settings: how they were generated.
            images: (prompt, seed, image) each.
            label: subfolder of the files.

        Raises:
            OSError: if a file cannot be written. The message names it.
        """
        rows = []
        for prompt, seed, image in images:
            key = self.key(settings, prompt, seed)
            row = {"file": f"{label}/{key[:16]}.png", "prompt": prompt, "seed": seed, **settings}
            rows.append({**row, "sha256": _save(image, self.folder / row["file"])})
            self.rows[key] = rows[-1]
        append_lines(own_part(self.folder / MANIFEST), rows)

    def add_sources(self, sources: LazyImages) -> None:
        """Save the images to edit of a prompt that are not in the store."""
        for number, name in enumerate(sources.file_hashes):
            if source_file(self.folder, name) is None:
                _save(sources[number], self.folder / SOURCES / f"{name}.png")

    def score(self, card: str, digest: str, prompt: str, *sources: str) -> float | None:
        """Return a judge's score of an image, None if it has not scored it.

        Args:
            card: hash of the judge's card.
            digest: hash of the image.
            prompt: the image's prompt.
            sources: hashes of the images to edit.
        """
        return self.scores.get((card, digest, prompt, *sources))

    def add_scores(self, judge: str, card: str, scores: Sequence[tuple[Any, ...]]) -> None:
        """Save a judge's scores.

        Args:
            judge: its name.
            card: hash of its card.
            scores: (hash of the image, prompt, hash of each image to edit, score) each.
        """
        rows = []
        for digest, prompt, *sources, score in scores:
            row = {"judge": judge, "card": card, "sha256": digest, "prompt": prompt, "score": score}
            rows.append({**row, "sources": sources} if sources else row)
            self.scores[(card, digest, prompt, *sources)] = score
        append_lines(own_part(self.folder / SCORES), rows)


def source_file(folder: Path, name: str) -> Path | None:
    """Return the file of an image to edit by its hash, None if the folder has none.

    Raises:
        ValueError: if the name leads out of the folder.
    """
    path = resolve_inside(f"{SOURCES}/{name}.png", folder)
    return path if path.is_file() else None


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a folder's images.

    Raises:
        ValueError: if a row is damaged, or names a file outside the folder.
    """
    return _checked_images(folder / MANIFEST, read_lines(folder / MANIFEST))


def _checked_images(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    folder = file.parent
    for number, row in enumerate(rows):
        with name_row(f"{file}, row {number}", f"Remove the folder {folder} and run again"):
            _check_texts(row, "file", "prompt", "sha256")
            if not isinstance(row["seed"], int):
                raise ValueError(f"seed is {row['seed']!r:.80}. Expected a whole number")
            if type(row.get("frames", 1)) is not int or row.get("frames", 1) < 1:
                raise ValueError(f"frames is {row['frames']!r:.80}. Expected a whole number of at least 1")
            resolve_inside(row["file"], folder)
    return rows


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a folder's scores.

    Raises:
        ValueError: if a row is damaged, or a score is not a finite number.
    """
    return _checked_scores(folder / SCORES, read_lines(folder / SCORES))


def _checked_scores(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, row in enumerate(rows):
        with name_row(f"{file}, row {number}", f"Remove the folder {file.parent} and run again"):
            _check_texts(row, "judge", "prompt", "sha256")
            row.setdefault("card", None)
            if not isinstance(row["score"], int | float) or not math.isfinite(row["score"]):
                raise ValueError(f"score is {row['score']!r:.80}. Expected a finite number")
    return rows


def _check_texts(row: dict[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is {row[name]!r:.80}. Expected text")
        row[name].encode()  # refuses surrogates
    sources = row.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError(f"sources is {sources!r:.80}. Expected a list of hashes")


def _save(image: Image.Image, path: Path) -> str:
    """Write a PNG atomically and return its hash. Raise OSError that names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, fix="free space and run the same command again") as temporary:
        image.save(temporary, "PNG", compress_level=COMPRESS_LEVEL)
        return hashlib.sha256(temporary.read_bytes()).hexdigest()
