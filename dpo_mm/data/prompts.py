"""Prompt lists: a shipped list by name, a text file with a prompt a line, or a published set in its own form.

Published forms are told by their names and contents: GenEval's evaluation_metadata.jsonl, PartiPrompts.tsv,
T2I-CompBench's *_val.txt or a folder of them, DPG-Bench's folder of a text file a prompt. Categories are the file's own;
those of plain text are the world of shapes' where a prompt is of that world, else all prompts are one category.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dpo_mm.assets import resolve_asset
from dpo_mm.worlds import shapes

COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
"""Names of T2I-CompBench++'s categories, as its files have them before `_val.txt`."""
FORMS = "a text file with a prompt a line, GenEval's .jsonl, PartiPrompts' .tsv, T2I-CompBench's *_val.txt, DPG-Bench's folder"


class PromptSpec(NamedTuple):
    """What is asked for, and the category that its list puts it in."""

    text: str
    category: str


class PromptSet(NamedTuple):
    """Prompts in order, none twice. form: what the list is. balanced: its score is the mean of its categories' means."""

    prompts: tuple[PromptSpec, ...]
    form: str
    balanced: bool = False


def read_prompts(name: str, *, limit: int | None = None) -> list[str]:
    """The texts of a list, at most `limit`, taken in turn from each category. Raises ValueError as `read_prompt_set`."""
    return [prompt.text for prompt in read_prompt_set(name, limit=limit).prompts]


def read_prompt_set(name: str, *, limit: int | None = None) -> PromptSet:
    """The prompts of a list with their categories, at most `limit`, taken in turn from each category.

    Raises ValueError that names the file and line where it is missing, empty, or not in the form that it looks like.
    """
    path = Path(resolve_asset(name))
    if not path.exists():
        raise ValueError(f"prompts {name!r}: no such file; give {FORMS}, or a shipped list")
    found = _folder(path) if path.is_dir() else _file(path)
    first: dict[str, PromptSpec] = {}
    for prompt in found.prompts:
        first.setdefault(prompt.text, prompt)
    once = list(first.values())
    if not once:
        raise ValueError(f"prompts {name!r}: the file is empty; expected a prompt a line")
    return found._replace(prompts=tuple(once if limit is None else _spread(once, limit)))


def _file(path: Path) -> PromptSet:
    lines = _text(path).splitlines()
    if path.suffix == ".jsonl":
        return _json_lines(path, lines)
    if path.suffix == ".tsv" or lines[:1] == ["Prompt\tCategory\tChallenge\tNote"]:
        return _table(path, lines)
    kind = path.name.removesuffix("_val.txt")
    if path.name.endswith("_val.txt") and kind in COMPBENCH:
        return PromptSet(_named(lines, kind), "T2I-CompBench")
    texts = [line.strip() for line in lines if line.strip()]
    return PromptSet(tuple(PromptSpec(text, category(text)) for text in texts), "plain text")


def _named(lines: Iterable[str], kind: str) -> tuple[PromptSpec, ...]:
    return tuple(PromptSpec(line.strip(), kind) for line in lines if line.strip())


def _folder(path: Path) -> PromptSet:
    """T2I-CompBench's folder of lists, or DPG-Bench's of a file a prompt, whose names begin with where it is from."""
    files = sorted(path.glob("*.txt"))
    lists = [file for file in files if file.name.removesuffix("_val.txt") in COMPBENCH]
    if lists:
        each = (_named(_text(file).splitlines(), file.name.removesuffix("_val.txt")) for file in lists)
        return PromptSet(tuple(prompt for part in each for prompt in part), "T2I-CompBench")
    if not files:
        raise ValueError(
            f"prompts {str(path)!r}: no *.txt in this folder; expected DPG-Bench's or T2I-CompBench's files"
        )
    found = []
    for file in files:
        text, origin = " ".join(_text(file).split()), re.match(r"[A-Za-z_]+", file.stem)
        if not text:
            raise ValueError(f"prompts {str(path)!r}: {file.name} is empty; expected one prompt in each file")
        found.append(PromptSpec(text, origin[0].strip("_") or "all" if origin else "all"))
    return PromptSet(tuple(found), "DPG-Bench")


def _json_lines(path: Path, lines: list[str]) -> PromptSet:
    """GenEval's objects (tag, include, prompt), or any others with a prompt and perhaps a category."""
    found, official = [], True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); expected an object with a prompt") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(
                f"{path}, line {number}: no prompt; expected {{'tag': ..., 'prompt': ...}} as GenEval has it"
            )
        official = official and "tag" in row and "include" in row
        kind = str(row.get("tag") or row.get("category") or "all")
        found.append(PromptSpec(row["prompt"].strip(), kind.replace("_", " ")))
    return PromptSet(tuple(found), "GenEval" if official else "JSON lines", balanced=official)


def _table(path: Path, lines: list[str]) -> PromptSet:
    """PartiPrompts' table: tabs between cells, quotation marks that are only that."""
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"Prompt", "Category"} <= set(rows.fieldnames or ()):
        raise ValueError(
            f"{path}: columns {', '.join(rows.fieldnames or ())}; expected Prompt and Category, with tabs between"
        )
    found = []
    for row in rows:
        text, kind = (row["Prompt"] or "").strip(), (row["Category"] or "").strip()
        if text and not kind:
            raise ValueError(f"{path}, line {rows.line_num}: no Category; expected Prompt, Category, Challenge, Note")
        found += [PromptSpec(text, kind)] if text else []
    return PromptSet(tuple(found), "PartiPrompts")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); give {FORMS}") from None


def _spread(prompts: list[PromptSpec], limit: int) -> list[PromptSpec]:
    """As many from each category as there are, in turns, each category in an order fixed by its prompts' hashes."""
    groups: dict[str, list[PromptSpec]] = {}
    for prompt in sorted(prompts, key=lambda one: hashlib.sha256(one.text.encode()).digest()):
        groups.setdefault(prompt.category, []).append(prompt)
    queues = [groups[name] for name in sorted(groups)]
    taken: list[PromptSpec] = []
    while len(taken) < limit and any(queues):
        taken += [queue.pop(0) for queue in queues if queue]
    return taken[:limit]


def category(prompt: str) -> str:
    """The category of a prompt of the world of shapes; "all" for any other."""
    try:
        return shapes.parse(prompt).category
    except ValueError:
        return "all"


def seeds_of(prompt: str, samples: int, *, seed: int) -> list[int]:
    """Seeds of a prompt's pictures, the same in every run with this seed."""
    digest = hashlib.blake2b(f"{seed}\0{prompt}".encode(), digest_size=4).digest()
    start = int.from_bytes(digest, "little")
    return [(start + number) % 2**31 for number in range(samples)]
