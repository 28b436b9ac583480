"""Read prompt lists: bundled lists, text files, and the files of published benchmarks.

A text file has one prompt per line. The format is recognised by file names and contents: GenEval's evaluation_metadata.jsonl, PartiPrompts.tsv,
T2I-CompBench's *_val.txt or a folder of them, DPG-Bench's folder with one text file per prompt. Categories come from the
file. Prompts of plain text that describe the bundled shapes get a shapes category. All others have the category "all".
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.assets import resolve_asset
from dpo_mm.data.text_files import read_text
from dpo_mm.errors import name_row, one_line
from dpo_mm.worlds import shapes

COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
"""Categories of T2I-CompBench++, as in the names of its files before `_val.txt`."""
FORMATS = "a text file with one prompt per line, GenEval's .jsonl, PartiPrompts' .tsv, T2I-CompBench's *_val.txt, DPG-Bench's folder"


class PromptSpec(NamedTuple):
    """A prompt and its category in the list."""

    text: str
    category: str


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


def read_prompts(name: str, *, limit: int | None = None) -> list[str]:
    """Read the texts of a prompt list, at most `limit`, taken in turn from each category.

    Raises:
        ValueError: as `read_prompt_set`.
    """
    return [prompt.text for prompt in read_prompt_set(name, limit=limit).prompts]


def read_prompt_set(name: str, *, limit: int | None = None) -> PromptSet:
    """Read the distinct prompts of a list with their categories.

    Args:
        name: a file, a folder, or the name of a bundled list.
        limit: largest number of prompts, taken in turn from each category. None: all.

    Raises:
        ValueError: if the file is missing or empty, or a line does not have the format that the file seems to have.
    """
    path = Path(resolve_asset(name))
    if not path.exists():
        raise ValueError(f"prompts {name!r}: no such file. Give {FORMATS}, or a bundled list")
    with name_row(f"prompts {name!r}", "Fix the file", clear=(ValueError,)):
        prompt_set = _folder(path) if path.is_dir() else _file(path)
    first: dict[str, PromptSpec] = {}
    for prompt in prompt_set.prompts:
        first.setdefault(prompt.text, prompt)
    distinct = list(first.values())
    if not distinct:
        raise ValueError(f"prompts {name!r}: the file is empty. Expected one prompt per line")
    return prompt_set._replace(prompts=tuple(distinct if limit is None else _spread(distinct, limit)))


def _file(path: Path) -> PromptSet:
    text = _text(path)
    lines = text.split("\n")  # not splitlines(), which also splits at U+2028 and other characters inside a prompt
    listed = _json_list(text) if path.suffix != ".jsonl" and text.lstrip()[:1] == "[" else None
    if listed is not None:
        return _objects(path, [(f"entry {n}", entry) for n, entry in enumerate(listed, start=1)])
    if path.suffix in (".json", ".jsonl") or _is_json_lines(lines):
        return _json_lines(path, lines)
    if path.suffix == ".tsv" or lines[:1] == ["Prompt\tCategory\tChallenge\tNote"]:
        return _table(path, lines)
    header = [cell.strip().lower() for cell in next(csv.reader(lines[:1]), [])]
    if "prompt" in header and (path.suffix == ".csv" or len(header) > 1):
        return _csv(text)
    if path.suffix == ".csv":
        raise ValueError(
            f"{path}: columns {', '.join(header)[:200]}. Expected a column prompt, and optionally category"
        )
    kind = path.name.removesuffix("_val.txt")
    if path.name.endswith("_val.txt") and kind in COMPBENCH:
        return PromptSet(_named(lines, kind), "T2I-CompBench")
    texts = [line.strip() for line in lines if line.strip()]
    return PromptSet(tuple(PromptSpec(text, category(text)) for text in texts), "plain text")


def _named(lines: Iterable[str], kind: str) -> tuple[PromptSpec, ...]:
    return tuple(PromptSpec(line.strip(), kind) for line in lines if line.strip())


def _folder(path: Path) -> PromptSet:
    """Read T2I-CompBench's folder of lists, or DPG-Bench's folder of prompts. Its file names begin with the category."""
    files = sorted(path.glob("*.txt"))
    lists = [file for file in files if file.name.removesuffix("_val.txt") in COMPBENCH]
    if lists:
        parts = (_named(_text(file).split("\n"), file.name.removesuffix("_val.txt")) for file in lists)
        return PromptSet(tuple(prompt for part in parts for prompt in part), "T2I-CompBench")
    if not files:
        raise ValueError(
            f"prompts {str(path)!r}: no *.txt in this folder. Expected the files of DPG-Bench or T2I-CompBench"
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


def _csv(text: str) -> PromptSet:
    """Read a comma-separated table with a column prompt, and optionally category."""
    rows = csv.DictReader(io.StringIO(text))
    rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
    pairs = (((row["prompt"] or "").strip(), (row.get("category") or "all").strip()) for row in rows)
    return PromptSet(tuple(PromptSpec(text, kind) for text, kind in pairs if text), "CSV")


def _json_lines(path: Path, lines: list[str]) -> PromptSet:
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
    return _objects(path, rows)


def _objects(path: Path, rows: list[tuple[str, Any]]) -> PromptSet:
    """Read GenEval's objects (tag, include, prompt), other objects with a prompt and optionally a category, or texts."""
    prompts, official = [], True
    for place, row in rows:
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{path}, {place}: no prompt. Expected {{'tag': ..., 'prompt': ...}} as in GenEval")
        with name_row(f"{path}, {place}", "Write the prompt again, in valid Unicode"):
            row["prompt"].encode()
        official = official and "tag" in row and "include" in row
        kind = str(row.get("tag") or row.get("category") or "all")
        prompts.append(PromptSpec(row["prompt"].strip(), kind.replace("_", " ")))
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
    for prompt in sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest()):
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


def seeds_of(prompt: str, samples: int, *, seed: int) -> list[int]:
    """Derive the seeds of a prompt's images from the prompt and the run's seed.

    Args:
        prompt: the prompt.
        samples: number of images.
        seed: seed of the run.

    Returns:
        `samples` consecutive seeds modulo 2^31, the same in every run with this seed.
    """
    digest = hashlib.blake2b(f"{seed}\0{prompt}".encode(), digest_size=4).digest()
    start = int.from_bytes(digest, "little")
    return [(start + number) % 2**31 for number in range(samples)]
