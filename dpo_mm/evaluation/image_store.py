"""Pictures of a comparison on disk, with what each was drawn from and what each judge said of it.

A folder of PNG files and two lists of JSON lines. manifest.jsonl: one row a picture, with its hash and all that decides
its pixels, so that a comparison which was cut goes on where it was, and anyone can check or redraw a picture later.
scores.jsonl: one row a picture and judge. A picture is found by how it was drawn, not by what for: two steps of a
comparison that need the same picture share one. Files are written aside and renamed, rows go in after their file; what a
kill leaves half is left out and made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image

from dpo_mm.data.image_files import decode_image
from dpo_mm.resumable import atomic_write

FOLDER, MANIFEST, SCORES = "pictures", "manifest.jsonl", "scores.jsonl"
NAMES = ("model", "revision", "adapter")
"""What a row says beside its weights' hash; the hash decides whether a picture is the same."""
QUICKLY = 1
"""Compression level of the files: a large picture is written in a twentieth of the time of the best, a tenth larger."""


class Pictures(Sequence[Image.Image]):
    """Picture files as a sequence that decodes each when it is asked for, so that thousands need no memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, place: int) -> Image.Image: ...
    @overload
    def __getitem__(self, place: slice) -> Pictures: ...
    def __getitem__(self, place: int | slice) -> Image.Image | Pictures:
        if isinstance(place, slice):
            return Pictures(self.files[place])
        return decode_image(self.files[place].read_bytes())


class ImageStore:
    """The pictures in a folder by how they were drawn, and their scores by judge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.rglob(".*.part"):
            left.unlink(missing_ok=True)
        self.rows = {self.key(row, row["prompt"], row["seed"]): row for row in read_lines(folder / MANIFEST)}
        self.said = {(row["card"], row["sha256"], row["prompt"]): row["score"] for row in read_lines(folder / SCORES)}

    @staticmethod
    def key(how: Mapping[str, Any], prompt: str, seed: int) -> str:
        """What a picture is found by: a hash of its prompt, its seed and how it is drawn, whatever the model is called."""
        decides = {name: how[name] for name in how if name not in (*NAMES, "file", "sha256", "prompt", "seed")}
        return hashlib.sha256(json.dumps([decides, prompt, seed], sort_keys=True).encode()).hexdigest()

    def find(self, how: Mapping[str, Any], prompt: str, seed: int) -> Path | None:
        """The file of a picture that is there with the hash that its row has; None otherwise."""
        row = self.rows.get(self.key(how, prompt, seed))
        if row is None:
            return None
        path = self.folder / row["file"]
        whole = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        return path if whole else None

    def add(self, how: Mapping[str, Any], drawn: Iterable[tuple[str, int, Image.Image]], *, label: str) -> None:
        """Keep pictures, (prompt, seed, picture) each, in the subfolder `label`."""
        rows = []
        for prompt, seed, image in drawn:
            key = self.key(how, prompt, seed)
            row = {"file": f"{label}/{key[:16]}.png", "prompt": prompt, "seed": seed, **how}
            rows.append({**row, "sha256": _save(image, self.folder / row["file"])})
            self.rows[key] = rows[-1]
        append(self.folder / MANIFEST, rows)

    def score(self, card: str, digest: str, prompt: str) -> float | None:
        """What a judge said of a picture before; None where it was not asked."""
        return self.said.get((card, digest, prompt))

    def note(self, judge: str, card: str, found: Sequence[tuple[str, str, float]]) -> None:
        """Keep what a judge says, (hash, prompt, score) each."""
        rows = [{"judge": judge, "card": card, "sha256": h, "prompt": prompt, "score": s} for h, prompt, s in found]
        self.said |= {(card, row["sha256"], row["prompt"]): row["score"] for row in rows}
        append(self.folder / SCORES, rows)


def _save(image: Image.Image, path: Path) -> str:
    """Write a PNG aside and rename it; returns its hash. Raises OSError that names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, fix="free space and run the same again") as beside:
        image.save(beside, "PNG", compress_level=QUICKLY)
        return hashlib.sha256(beside.read_bytes()).hexdigest()


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a list; the end that a kill has cut is taken off, so that the next row starts on a line of its own."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with atomic_write(path) as beside:
            beside.write_bytes(whole)
    try:
        return [json.loads(line) for line in whole.decode().splitlines() if line]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove the folder {path.parent} and draw again") from None
