"""Read prompt lists: bundled lists, text files, and the files of published benchmarks.

A text file has one prompt per line. The format is recognised by file names and contents: GenEval's evaluation_metadata.jsonl, PartiPrompts.tsv,
T2I-CompBench's *_val.txt or a folder of them, DPG-Bench's folder with one text file per prompt. Categories come from the
file. Prompts of plain text that describe the bundled shapes get a shapes category. All others have the category "all".

A prompt of an editing model comes with the images to edit: `image` or `images` in JSON, a column of CSV or Parquet, or a folder with
metadata.jsonl. Their paths lead only to files in the folder of the list. The same text with another image is another prompt.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.assets import resolve_asset
from dpo_mm.data.lazy_images import LazyImages, image_cells, lazy_images, source_cells
from dpo_mm.data.row_files import open_rows
from dpo_mm.data.row_paths import check_regular, confine
from dpo_mm.data.text_files import read_text
from dpo_mm.errors import name_row, one_line
from dpo_mm.worlds import shapes

COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
"""Categories of T2I-CompBench++, as in the names of its files before `_val.txt`."""
FORMATS = (
    "a text file with one prompt per line, GenEval's .jsonl, PartiPrompts' .tsv, T2I-CompBench's *_val.txt, DPG-Bench's folder, "
    "or prompts with images to edit as JSON, CSV, Parquet or a folder with metadata.jsonl"
)
METADATA = "metadata.jsonl"
NO_SOURCES = LazyImages(())
ROWS_IN_MEMORY = 32
"""Rows of a Parquet file whose images are in memory at once."""


class PromptSpec(NamedTuple):
    """A prompt, its category in the list, and the images to edit, which are decoded at each access."""

    text: str
    category: str
    sources: LazyImages = NO_SOURCES

    @property
    def item(self) -> str:
        """Name that no other prompt of the list has: the text, with the hashes of the images to edit if there are any."""
        return item_name(self.text, self.sources)

    @property
    def content(self) -> tuple[Any, ...]:
        """Fields for cache keys. Images to edit are their hashes, so that they are not decoded."""
        return (self.text, self.category, *self.sources.file_hashes)


class PromptSet(NamedTuple):
    """Distinct prompts in order.

    Args:
        prompts: the prompts with their categories.
        format: name of the benchmark or of the file format.
        balanced: True if the benchmark's score is the mean of its categories' means.
    """

    prompts: tuple[PromptSpec, ...]
    format: str
    balanced: bool = False

    @property
    def content(self) -> tuple[Any, ...]:
        """Fields for cache keys."""
        return (tuple(prompt.content for prompt in self.prompts), self.format, self.balanced)


def item_name(text: str, sources: LazyImages) -> str:
    """Name a prompt by its text and the hashes of its images to edit. Without images it is the text."""
    return f"{text} [image {' '.join(sources.file_hashes)}]" if sources else text


def read_prompts(name: str, *, limit: int | None = None) -> list[str]:
    """Read the texts of a prompt list, at most `limit`, taken in turn from each category.

    Raises:
        ValueError: as `read_prompt_set`, or if a prompt has an image to edit.
    """
    prompts = read_prompt_set(name, limit=limit).prompts
    if any(prompt.sources for prompt in prompts):
        raise ValueError(
            f"prompts {name!r}: they have images to edit, which only compare and mine pass to a model. Give prompts without images"
        )
    return [prompt.text for prompt in prompts]


def read_prompt_set(name: str, *, limit: int | None = None) -> PromptSet:
    """Read the distinct prompts of a list with their categories.

    Args:
        name: a file, a folder, or the name of a bundled list.
        limit: largest number of prompts, taken in turn from each category. None: all.

    Raises:
        ValueError: if the file is missing or empty, a line does not have the format that the file seems to have, or an image to edit
            is missing or no image. One that is damaged after its header is refused when it is decoded.
    """
    path = Path(resolve_asset(name))
    if not path.exists():
        raise ValueError(f"prompts {name!r}: no such file. Give {FORMATS}, or a bundled list")
    with name_row(f"prompts {name!r}", "Fix the file", clear=(ValueError,)):
        prompt_set = _folder(path) if path.is_dir() else _file(path)
    first: dict[str, PromptSpec] = {}
    for prompt in prompt_set.prompts:
        first.setdefault(prompt.item, prompt)
    distinct = list(first.values())
    if not distinct:
        raise ValueError(f"prompts {name!r}: the file is empty. Expected one prompt per line")
    return prompt_set._replace(prompts=tuple(distinct if limit is None else _spread(distinct, limit)))


def _file(path: Path) -> PromptSet:
    if path.suffix == ".parquet":
        return _parquet(path)
    text = _text(path)
    lines = text.split("\n")  # not splitlines(), which also splits at U+2028 and other characters inside a prompt
    listed = _json_list(text) if path.suffix != ".jsonl" and text.lstrip()[:1] == "[" else None
    if listed is not None:
        return _objects(path, [(f"entry {n}", entry) for n, entry in enumerate(listed, start=1)])
    if path.suffix in (".json", ".jsonl") or _is_json_lines(lines):
        return _objects(path, _json_rows(path, lines))
    if path.suffix == ".tsv" or lines[:1] == ["Prompt\tCategory\tChallenge\tNote"]:
        return _table(path, lines)
    header = [cell.strip().lower() for cell in next(csv.reader(lines[:1]), [])]
    if "prompt" in header and (path.suffix == ".csv" or len(header) > 1):
        return _csv(path, text)
    if path.suffix == ".csv":
        raise ValueError(
            f"{path}: columns {', '.join(header)[:200]}. Expected a column prompt, and optionally category and image"
        )
    kind = path.name.removesuffix("_val.txt")
    if path.name.endswith("_val.txt") and kind in COMPBENCH:
        return PromptSet(_named(lines, kind), "T2I-CompBench")
    texts = [line.strip() for line in lines if line.strip()]
    return PromptSet(tuple(PromptSpec(text, category(text)) for text in texts), "plain text")


def _named(lines: Iterable[str], kind: str) -> tuple[PromptSpec, ...]:
    return tuple(PromptSpec(line.strip(), kind) for line in lines if line.strip())


def _folder(path: Path) -> PromptSet:
    """Read images to edit with metadata.jsonl, T2I-CompBench's lists, or DPG-Bench's prompts, whose names begin with the category."""
    if (path / METADATA).exists():
        return _image_folder(check_regular(path / METADATA, path))
    files = sorted(path.glob("*.txt"))
    lists = [file for file in files if file.name.removesuffix("_val.txt") in COMPBENCH]
    if lists:
        parts = (_named(_text(file).split("\n"), file.name.removesuffix("_val.txt")) for file in lists)
        return PromptSet(tuple(prompt for part in parts for prompt in part), "T2I-CompBench")
    if not files:
        raise ValueError(
            f"prompts {str(path)!r}: no *.txt in this folder. Expected the files of DPG-Bench or T2I-CompBench, or {METADATA}"
        )
    prompts = []
    for file in files:
        text, origin = " ".join(_text(file).split()), re.match(r"[A-Za-z_]+", file.stem)
        if not text:
            raise ValueError(f"prompts {str(path)!r}: {file.name} is empty. Expected one prompt per file")
        prompts.append(PromptSpec(text, origin[0].strip("_") or "all" if origin else "all"))
    return PromptSet(tuple(prompts), "DPG-Bench")


def is_prompt_list(path: Path) -> bool:
    """Tell if a file holds only prompts by its name, or for a CSV file by its columns prompt and category."""
    if path.suffix != ".csv" or not path.is_file():
        return path.suffix == ".txt"
    header = next(csv.reader(_text(path).split("\n")[:1]), [])
    return "prompt" in header and set(header) <= {"prompt", "category"}


def _image_folder(path: Path) -> PromptSet:
    """Read the images to edit of a folder, whose metadata.jsonl has a prompt and a file_name, or a list file_names, per line."""
    rows = []
    for place, row in _json_rows(path, _text(path).split("\n")):
        files = (row.get("file_names") or row.get("file_name")) if isinstance(row, dict) else None
        if not isinstance(row, dict) or not (files or image_cells(row) or source_cells(row)):
            raise ValueError(f"{path}, {place}: no file_name. Expected {{'file_name': ..., 'prompt': ...}}")
        rows.append((place, {"image": files, "prompt": row.get("text"), **row}))
    return _objects(path, rows)._replace(format="folder of images")


def _json_list(text: str) -> list[Any] | None:
    """Parse a JSON list, or return None if the text is not one: a line of prompts may begin with a bracket."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entries if isinstance(entries, list) else None


def _is_json_lines(lines: list[str]) -> bool:
    """Tell if the first line that is not empty is a JSON object."""
    first = next((line for line in lines if line.strip()), "")
    try:
        return first.lstrip().startswith("{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _sources(row: dict[str, Any], path: Path, place: str) -> LazyImages:
    """Return the images to edit of a row. Texts are paths relative to the file's folder."""
    cells = image_cells(row) or source_cells(row)
    return lazy_images(confine(cells, path.parent, is_path=True), f"{path}, {place}") if cells else NO_SOURCES


def _csv(path: Path, text: str) -> PromptSet:
    """Read a comma-separated table with a column prompt, and optionally category and image."""
    rows = csv.DictReader(io.StringIO(text))
    rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
    prompts = []
    for row in rows:
        prompt = (row["prompt"] or "").strip()
        if prompt:
            kind = (row.get("category") or "all").strip()
            prompts.append(PromptSpec(prompt, kind, _sources(row, path, f"line {rows.line_num}")))
    return PromptSet(tuple(prompts), "CSV")


def _parquet(path: Path) -> PromptSet:
    """Read a table with a column prompt, and optionally category and images, which are read from the file again when used."""
    rows = open_rows(str(path))
    if "prompt" not in rows.column_names:
        raise ValueError(f"{path}: columns {', '.join(rows.column_names)[:200]}. Expected prompt, and optionally image")
    if "image_source" in rows.column_names and not {"image", "images"} & set(rows.column_names):
        rows = rows.rename_column("image_source", "images")
    stored = rows.select_columns([name for name in ("images", "image") if name in rows.column_names])
    rows = rows.select_columns([*stored.column_names, *{"prompt", "category"} & set(rows.column_names)])
    batches = (batch.to_pylist() for batch in rows.with_format("arrow").iter(ROWS_IN_MEMORY))
    prompts = []
    for number, row in enumerate(chain.from_iterable(batches)):
        text, name = row["prompt"], f"{path}, row {number}"
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: no prompt. Expected a text in the column prompt")
        cells = image_cells(row)
        sources = lazy_images(cells, name, rows=stored, number=number) if cells else NO_SOURCES
        prompts.append(PromptSpec(text.strip(), str(row.get("category") or "all"), sources))
    return PromptSet(tuple(prompts), "Parquet")


def _json_rows(path: Path, lines: Sequence[str]) -> list[tuple[str, Any]]:
    """Parse the lines of a file of JSON lines, each with its place."""
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({one_line(error)}). Expected an object with a prompt"
            ) from None
    return rows


def _objects(path: Path, rows: list[tuple[str, Any]]) -> PromptSet:
    """Read GenEval's objects (tag, include, prompt), others with a prompt and optionally a category and images, or texts."""
    prompts, official = [], True
    for place, row in rows:
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{path}, {place}: no prompt. Expected {{'tag': ..., 'prompt': ...}} as in GenEval")
        with name_row(f"{path}, {place}", "Write the prompt again, in valid Unicode"):
            row["prompt"].encode()
        official = official and "tag" in row and "include" in row
        kind = str(row.get("tag") or row.get("category") or "all")
        prompts.append(PromptSpec(row["prompt"].strip(), kind.replace("_", " "), _sources(row, path, place)))
    return PromptSet(tuple(prompts), "GenEval" if official else "JSON", balanced=official)


def _table(path: Path, lines: list[str]) -> PromptSet:
    """Read PartiPrompts' table. Cells are separated by tabs, and quotation marks are ordinary characters."""
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"Prompt", "Category"} <= set(rows.fieldnames or ()):
        raise ValueError(
            f"{path}: columns {', '.join(rows.fieldnames or ())[:200]}. Expected Prompt and Category, separated by tabs"
        )
    prompts = []
    for row in rows:
        text, kind = (row["Prompt"] or "").strip(), (row["Category"] or "").strip()
        if text and not kind:
            raise ValueError(f"{path}, line {rows.line_num}: no Category. Expected Prompt, Category, Challenge, Note")
        prompts += [PromptSpec(text, kind)] if text else []
    return PromptSet(tuple(prompts), "PartiPrompts")


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"{error}. Give {FORMATS}") from None


def _spread(prompts: list[PromptSpec], limit: int) -> list[PromptSpec]:
    """Take prompts in turn from each category. Within a category the order is that of the prompts' hashes."""
    groups: dict[str, list[PromptSpec]] = {}
    order = lambda prompt: (hashlib.sha256(prompt.text.encode()).digest(), prompt.sources.file_hashes)
    for prompt in sorted(prompts, key=order):
        groups.setdefault(prompt.category, []).append(prompt)
    queues = [groups[name] for name in sorted(groups)]
    taken: list[PromptSpec] = []
    while len(taken) < limit and any(queues):
        taken += [queue.pop(0) for queue in queues if queue]
    return taken[:limit]


def category(prompt: str) -> str:
    """Return the shapes category of a prompt, or "all" if it does not describe the bundled shapes."""
    try:
        return shapes.parse(prompt).category
    except ValueError:
        return "all"


def seeds_of(prompt: str, samples: int, *, seed: int, sources: Sequence[str] = ()) -> list[int]:
    """Derive the seeds of a prompt's images from the prompt, the images to edit and the run's seed.

    Args:
        prompt: the prompt.
        samples: number of images.
        seed: seed of the run.
        sources: hash of each image to edit.

    Returns:
        `samples` consecutive seeds modulo 2^31, the same in every run with this seed.
    """
    digest = hashlib.blake2b("\0".join([str(seed), prompt, *sources]).encode(), digest_size=4).digest()
    start = int.from_bytes(digest, "little")
    return [(start + number) % 2**31 for number in range(samples)]
