"""Read questions for a vision-language model: images, a prompt and, if known, the ground truth.

Images are decoded or rendered when a question is used. A name selects a synthetic dataset. A file is Parquet or JSON lines with the columns
`images` (or `image`), `prompt` and, optionally, `ground_truth`, `id`, `category` and `rubric`. `ground_truth` may be a list, of which any
is right. In JSON lines an image is a path relative to the file. The files of published benchmarks (`dpo_mm.data.benchmarks`) are
read in their own formats. `OmniDocBench.json#pages` reads whole pages of a benchmark whose questions are parts of pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpo_mm.data.benchmarks import question_rows
from dpo_mm.data.conversation import as_messages
from dpo_mm.data.lazy_images import LazyImages, image_cells, lazy_images
from dpo_mm.data.row_files import open_rows
from dpo_mm.data.row_paths import confine, regular_files
from dpo_mm.data.text_files import read_text, table_suffix
from dpo_mm.errors import did_you_mean, name_row, one_line

TRAIN_SEED, HELD_OUT_SEED, PART_SEED = 1, 0, 0
DEFAULT_COUNT = 400
"""Number of questions of a synthetic dataset if there is no limit."""
ROWS_IN_MEMORY = 32
"""Rows of a Parquet file whose images are in memory at once."""


@dataclass(frozen=True)
class Question:
    """A question to a vision-language model.

    Args:
        id: unique name.
        images: images of the prompt, possibly none. Those of a file are decoded at each access.
        prompt: a text, or chat messages.
        ground_truth: the correct response, "" if unknown or if the correct response is empty.
        category: category for the report.
        other_truths: further correct responses. A response counts against the one that suits it best.
        has_ground_truth: False if the correct response is unknown.
        rubric: what a judge that is a model grades by. "": its own rubric.
        truth_is_response: False if the ground truth only describes correct responses, as the tests of a benchmark do.
    """

    id: str
    images: Sequence[Image.Image]
    prompt: Any
    ground_truth: str
    category: str
    other_truths: tuple[str, ...] = ()
    has_ground_truth: bool = True
    rubric: str = ""
    truth_is_response: bool = True

    @property
    def ground_truths(self) -> tuple[str, ...]:
        """All correct responses."""
        return (self.ground_truth, *self.other_truths)

    @property
    def image_hashes(self) -> tuple[str, ...]:
        """Hashes of the images of files. Empty for rendered images."""
        return self.images.file_hashes if isinstance(self.images, LazyImages) else ()

    @property
    def content(self) -> dict[str, Any]:
        """Fields for cache keys. Images of files are their hashes, so that they are not decoded."""
        content = {**vars(self), "images": self.image_hashes or self.images}
        unneeded = ("truth_is_response",) if self.rubric else ("truth_is_response", "rubric")
        return {name: value for name, value in content.items() if name not in unneeded}


def image_groups(questions: Sequence[Question]) -> NDArray[np.int64]:
    """Return the group of each question, (questions,): those about the same images of files are repeats of these images."""
    numbers: dict[Any, int] = {}
    keys = (question.image_hashes or number for number, question in enumerate(questions))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def read_questions(
    name: str, *, limit: int | None = None, part: str | None = None, rubric: str | None = None
) -> list[Question]:
    """Read the questions of a synthetic dataset or of a file.

    Args:
        name: name of a synthetic dataset (a key of WORLDS), or path of a Parquet or JSON-lines file, or of a folder of JSON-lines
            files.
        limit: largest number of questions. None: all of a file, DEFAULT_COUNT of a synthetic dataset.
        part: "k/n" for the k-th of n random parts that have no question and no image of a file in common. `limit` is that
            of the part.
        rubric: rubric of the questions that have none. None: no rubric.

    Raises:
        ValueError: if the file is missing or empty, or a row is not readable, has no prompt, or names a file that is missing
            or not an image, or if the part is not one or has fewer than 2 questions.
    """
    questions = _read_questions(name, limit) if part is None else _read_part(name, limit, part)
    if rubric is None:
        return questions
    return [question if question.rubric else replace(question, rubric=rubric) for question in questions]


def questions_file(name: str) -> Path:
    """Path of a file of questions: its name, without # and what a question is about (`OmniDocBench.json#pages`)."""
    file, _, unit = name.rpartition("#")
    return Path(file) if unit and Path(file).is_file() and not Path(name).exists() else Path(name)


def _read_questions(name: str, limit: int | None) -> list[Question]:
    if name in WORLDS:
        return list(WORLDS[name](DEFAULT_COUNT if limit is None else limit))
    path = questions_file(name)
    unit = "" if path == Path(name) else name.rpartition("#")[2]
    if path.is_dir() and (files := regular_files(path, "*.jsonl")):
        read_all = (question for file in files for question in _json_questions(file, limit))
        return list(islice(read_all, limit))
    if not path.is_file():
        raise ValueError(
            f"questions {name!r}: no such file; {did_you_mean(name, WORLDS)}. Or give Parquet or JSON lines with columns "
            "images, prompt and ground_truth"
        )
    questions = list(
        _parquet_questions(path, limit) if path.suffix == ".parquet" else _json_questions(path, limit, unit)
    )
    if not questions:
        raise ValueError(f"{name}: no questions in the file. Expected one row per question")
    return questions


def _read_part(name: str, limit: int | None, part: str) -> list[Question]:
    """Read one part of the questions. The order of the file does not decide which part a question is in."""
    texts = part.split("/")
    number, count = (int(text) if text.isdecimal() else 0 for text in (texts if len(texts) == 2 else ("", "")))
    if not 1 <= number <= count:
        raise ValueError(f"part {part!r}: expected k/n with k from 1 to n, such as 1/3")
    total = count * (DEFAULT_COUNT if limit is None else limit) if name in WORLDS else None
    questions = read_questions(name, limit=total)
    groups = image_groups(questions)
    order = np.random.default_rng(PART_SEED).permutation(len(set(groups.tolist())))
    chosen = np.flatnonzero(np.isin(groups, order[number - 1 :: count]))[:limit]
    if len(set(groups[chosen].tolist())) < 2:
        about = "" if len(order) == len(questions) else f" about {len(order)} images"
        raise ValueError(
            f"questions {name!r}: {len(questions)} questions{about} do not make {count} parts of 2 or more. Add questions"
        )
    return [questions[n] for n in chosen]


@lru_cache(maxsize=1024)
def _rendering(render: Callable[[Any], Image.Image], content: Any) -> Image.Image:
    """Render an image of a synthetic task. A render takes 6 ms, and a question's images are used several times."""
    return render(content)


def _rendered(render: Callable[[Any], Image.Image], content: Any) -> Image.Image:
    """Return a copy of a rendered image, which the caller may change."""
    return _rendering(render, content).copy()


def _pages(count: int, *, held_out: bool) -> Iterator[Question]:
    from dpo_mm.worlds import documents

    seed = HELD_OUT_SEED if held_out else TRAIN_SEED
    for number, page in enumerate(documents.pages(count, seed, held_out=held_out)):
        prompt, ground_truth = documents.PROMPTS[page.form], documents.transcription(page)
        kind = page.kind if page.form == "text" else f"{page.kind}, json"
        yield Question(
            f"page-{number}", LazyImages([partial(_rendered, documents.render, page)]), prompt, ground_truth, kind
        )


def _scenes(count: int, *, held_out: bool) -> Iterator[Question]:
    from dpo_mm.worlds import caption_scenes, shapes

    seed = HELD_OUT_SEED if held_out else TRAIN_SEED
    for number, scene in enumerate(caption_scenes.scenes(count, seed, held_out=held_out)):
        things = f"{len(scene.objects)} thing{'s' * (len(scene.objects) > 1)}"
        images, truth = LazyImages([partial(_rendered, shapes.render, scene)]), caption_scenes.caption(scene)
        yield Question(f"scene-{number}", images, caption_scenes.PROMPT, truth, things)


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


def _json_questions(path: Path, limit: int | None, unit: str = "") -> Iterator[Question]:
    for number, row in enumerate(islice(question_rows(_json_rows(path), path, unit), limit)):
        name = f"{path}, row {number}"
        _check_prompt(row, name)
        images = row.get("images")
        if not isinstance(images, LazyImages):  # a benchmark's question may have part of an image
            cells = confine(image_cells(row), path.parent, is_path=True)
            images = lazy_images(cells, name) if cells else ()
        yield _question(row, name, number, images)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    text = read_text(path)
    try:
        entries = json.loads(text) if table_suffix(path) != ".jsonl" and text.lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not JSON ({one_line(error)}). Expected a list of objects, or one object per line"
        ) from None
    if entries is not None:
        yield from (_checked_row(entry, path, f"entry {number + 1}") for number, entry in enumerate(entries))
        return
    lines = text.split("\n")  # not splitlines(), which also splits at U+2028 inside a text
    yield from (_parsed(line, path, number) for number, line in enumerate(lines) if line.strip())


def _parquet_questions(path: Path, limit: int | None) -> Iterator[Question]:
    with name_row(str(path), "Expected Parquet with the columns images, prompt and ground_truth", clear=(ValueError,)):
        rows = open_rows(str(path))
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        columns = [name for name in ("images", "image") if name in rows.column_names]
        stored = rows.select_columns(columns)
        batches = (batch.to_pylist() for batch in rows.with_format("arrow").iter(ROWS_IN_MEMORY))
        for number, row in enumerate(chain.from_iterable(batches)):
            name = f"{path}, row {number}"
            _check_prompt(row, name)
            cells = image_cells(row)
            images = lazy_images(cells, name, rows=stored, number=number) if cells else ()
            yield _question(row, name, number, images)


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


def _check_prompt(row: dict[str, Any], name: str) -> None:
    """Raise ValueError if a row has no prompt."""
    if not row.get("prompt"):
        raise ValueError(f"{name}: no prompt. Expected the columns images (or image), prompt and ground_truth")
    with name_row(name, "Write the prompt as a text or as chat messages, in valid Unicode"):
        as_messages(row["prompt"], "user")
        json.dumps(
            [row.get(column) for column in ("prompt", "ground_truth", "id", "category", "rubric")], ensure_ascii=False
        ).encode()


def _question(row: dict[str, Any], name: str, number: int, images: Sequence[Image.Image]) -> Question:
    truths = _truths(row.get("ground_truth"), name)
    return Question(
        str(number if row.get("id") is None else row["id"]),
        images,
        row["prompt"],
        truths[0] if truths else "",
        str(row.get("category") or "all"),
        other_truths=truths[1:],
        has_ground_truth=bool(truths),
        rubric=str(row.get("rubric") or ""),
        truth_is_response=row.get("truth_is_response") is not False,
    )


def _truths(cell: Any, name: str) -> tuple[str, ...]:
    """Return the correct responses of a row as texts: one, each of a list, or none for null."""
    cells = cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]
    if any(not isinstance(each, str | int | float | dict) for each in cells):
        raise ValueError(
            f"{name}: ground_truth is {cell!r:.80}. Expected a text, a number, or a list of them, any of which is right"
        )
    texts = (each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in cells)
    return tuple(dict.fromkeys(texts))
