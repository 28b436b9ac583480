"""Read questions for a vision-language model: images, a prompt and, if known, the ground truth.

A name selects a synthetic dataset, which is rendered when it is read. A file is Parquet or JSON lines with the columns
`images` (or `image`), `prompt` and, optionally, `ground_truth`, `id` and `category`. `ground_truth` may be a list, of which any
is right. In JSON lines an image is a path relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dpo_mm.data.conversation import as_messages
from dpo_mm.data.row_paths import LONGEST_SHOWN, confine
from dpo_mm.data.text_files import read_text, table_suffix
from dpo_mm.errors import did_you_mean, name_row, one_line

TRAIN_SEED, HELD_OUT_SEED = 1, 0
DEFAULT_COUNT = 400
"""Number of questions of a synthetic dataset if there is no limit."""


@dataclass(frozen=True)
class Question:
    """A question to a vision-language model.

    Args:
        id: unique name.
        images: images of the prompt, possibly none.
        prompt: a text, or chat messages.
        ground_truth: the correct response, "" if unknown or if the correct response is empty.
        category: category for the report.
        other_truths: further correct responses. A response counts against the one that suits it best.
        has_ground_truth: False if the correct response is unknown.
    """

    id: str
    images: tuple[Image.Image, ...]
    prompt: Any
    ground_truth: str
    category: str
    other_truths: tuple[str, ...] = ()
    has_ground_truth: bool = True

    @property
    def ground_truths(self) -> tuple[str, ...]:
        """All correct responses."""
        return (self.ground_truth, *self.other_truths)


def read_questions(name: str, *, limit: int | None = None) -> list[Question]:
    """Read the questions of a synthetic dataset or of a file.

    Args:
        name: name of a synthetic dataset (a key of WORLDS), or path of a Parquet or JSON-lines file.
        limit: largest number of questions. None: all of a file, DEFAULT_COUNT of a synthetic dataset.

    Raises:
        ValueError: if the file is missing or empty, or a row is not readable or has no prompt.
    """
    if name in WORLDS:
        return list(WORLDS[name](DEFAULT_COUNT if limit is None else limit))
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"questions {name!r}: no such file; {did_you_mean(name, WORLDS)}. Or give Parquet or JSON lines with columns "
            "images, prompt and ground_truth"
        )
    questions = [_question(row, path, number) for number, row in enumerate(_rows(path, limit))]
    if not questions:
        raise ValueError(f"{name}: no questions in the file. Expected one row per question")
    return questions


def _pages(count: int, *, held_out: bool) -> Iterator[Question]:
    from dpo_mm.worlds import documents

    seed = HELD_OUT_SEED if held_out else TRAIN_SEED
    for number, page in enumerate(documents.pages(count, seed, held_out=held_out)):
        prompt, ground_truth = documents.PROMPTS[page.form], documents.transcription(page)
        kind = page.kind if page.form == "text" else f"{page.kind}, json"
        yield Question(f"page-{number}", (documents.render(page),), prompt, ground_truth, kind)


def _scenes(count: int, *, held_out: bool) -> Iterator[Question]:
    from dpo_mm.worlds import caption_scenes, shapes

    seed = HELD_OUT_SEED if held_out else TRAIN_SEED
    for number, scene in enumerate(caption_scenes.scenes(count, seed, held_out=held_out)):
        things = f"{len(scene.objects)} thing{'s' * (len(scene.objects) > 1)}"
        yield Question(
            f"scene-{number}", (shapes.render(scene),), caption_scenes.PROMPT, caption_scenes.caption(scene), things
        )


def _sums(count: int, *, held_out: bool) -> Iterator[Question]:
    from dpo_mm.worlds import sums

    seed = HELD_OUT_SEED if held_out else TRAIN_SEED
    for number, task in enumerate(sums.sums(count, seed, held_out=held_out)):
        yield Question(f"sum-{number}", (), task.prompt, str(task.number), task.kind)


WORLDS: dict[str, Callable[[int], Iterator[Question]]] = {
    "pages-train": lambda count: _pages(count, held_out=False),
    "pages-held-out": lambda count: _pages(count, held_out=True),
    "scenes-train": lambda count: _scenes(count, held_out=False),
    "scenes-held-out": lambda count: _scenes(count, held_out=True),
    "sums-train": lambda count: _sums(count, held_out=False),
    "sums-held-out": lambda count: _sums(count, held_out=True),
}
"""Synthetic datasets by name: functions from a number of questions to the questions."""


def _rows(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        text = read_text(path)
        try:
            entries = json.loads(text) if table_suffix(path) != ".jsonl" and text.lstrip().startswith("[") else None
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not JSON ({one_line(error)}). Expected a list of objects, or one object per line"
            ) from None
        lines = text.split("\n")  # not splitlines(), which also splits at U+2028 inside a text
        rows = (_parsed(line, path, number) for number, line in enumerate(lines) if line.strip())
        if entries is not None:
            rows = (_checked_row(entry, path, f"entry {number + 1}") for number, entry in enumerate(entries))
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with name_row(str(path), "Expected Parquet with the columns images, prompt and ground_truth"):
        yield from (row for batch in pq.ParquetFile(path).iter_batches(256) for row in batch.to_pylist())


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number + 1}: not JSON ({one_line(error)}). Expected one object per line"
        ) from None
    return _checked_row(row, path, f"line {number + 1}")


def _checked_row(row: Any, path: Path, position: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, {position}: expected an object with prompt, images and ground_truth")
    return row


def _question(row: dict[str, Any], path: Path, number: int) -> Question:
    if not row.get("prompt"):
        raise ValueError(
            f"{path}, row {number}: no prompt. Expected the columns images (or image), prompt and ground_truth"
        )
    with name_row(f"{path}, row {number}", "Write the prompt as a text or as chat messages, in valid Unicode"):
        as_messages(row["prompt"], "user")
        json.dumps(
            [row.get(name) for name in ("prompt", "ground_truth", "id", "category")], ensure_ascii=False
        ).encode()
    truths = _truths(row.get("ground_truth"), path, number)
    cells = row.get("images") or ([row["image"]] if row.get("image") else [])
    cells = cells if isinstance(cells, list) else [cells]
    return Question(
        str(number if row.get("id") is None else row["id"]),
        tuple(_image(cell, path, number) for cell in cells),
        row["prompt"],
        truths[0] if truths else "",
        str(row.get("category") or "all"),
        other_truths=truths[1:],
        has_ground_truth=bool(truths),
    )


def _truths(cell: Any, path: Path, number: int) -> tuple[str, ...]:
    """Return the correct responses of a row as texts: one, each of a list, or none for null."""
    cells = cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]
    if any(not isinstance(each, str | int | float | dict) for each in cells):
        raise ValueError(
            f"{path}, row {number}: ground_truth is {cell!r:.80}. Expected a text, a number, or a list of them, any of "
            "which is right"
        )
    texts = (each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in cells)
    return tuple(dict.fromkeys(texts))


def _image(cell: Any, path: Path, number: int) -> Image.Image:
    """Decode an image from its bytes or its path, as `datasets` stores them."""
    from dpo_mm.data.image_files import rgb_image

    try:
        return rgb_image(confine(cell, path.parent, is_path=True))
    except ValueError as error:
        name = str((cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else "") or "")
        raise ValueError(f"{path}, row {number}: image {name[:LONGEST_SHOWN]} cannot be read ({error})") from None
