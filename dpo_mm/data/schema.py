"""Rows of preference sets, as Arrow features, and their validation.

`ImagePreference`: two pictures of one prompt and what was said of them. Chosen and rejected are derived late
(`drop_ties`), so that a tie never turns into a win. `ResponsePreference`: two answers to one prompt, with its images.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset, Features

PREFERENCES = ("a", "b", "tie", "both_bad")
REQUIRED = ("prompt", "image_a", "image_b", "preference")
IN_MEMORY = 2**30
"""Bytes; Parquet up to this size is read into memory."""


class Response(NamedTuple):
    """What a model said: its text, how many tokens that took, and whether it was cut at the limit."""

    text: str
    tokens: int
    hit_limit: bool


def image_preference() -> Features:
    """Features of `ImagePreference`. p_a: probability that a wins, [0, 1]; votes and scores where they are known.

    image_source: the picture that the prompt says how to edit, for models that edit; null for those that draw from text.
    """
    from datasets import Features, Image, Value

    text, number = Value("string"), Value("float64")
    return Features(
        {
            "id": text,
            "prompt": text,
            "image_a": Image(),
            "image_b": Image(),
            "image_source": Image(),
            "preference": text,
            "p_a": number,
            "votes_a": Value("int64"),
            "votes_b": Value("int64"),
            "score_a": number,
            "score_b": number,
            "axis": text,
            "model_a": text,
            "model_b": text,
            "seed_a": Value("int64"),
            "seed_b": Value("int64"),
            "group_id": text,
            "source": text,
            "license": text,
        }
    )


def response_preference() -> Features:
    """Features of `ResponsePreference`, TRL's conversational preference with images, and where a row comes from.

    rejected_truncated: the rejected answer was cut, so that no end of turn belongs after it. reason: why it was rejected.
    probability: that chosen is the better one, [0, 1]. score_gap: by how much, in the judge's unit.
    """
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    text = Value("string")
    return Features(
        {
            "id": text,
            "images": List(Image()),
            "prompt": messages,
            "chosen": messages,
            "rejected": messages,
            "rejected_truncated": Value("bool"),
            "probability": Value("float64"),
            "score_gap": Value("float64"),
            "axis": text,
            "reason": text,
            "model": text,
            "chosen_model": text,
            "rejected_model": text,
            "decoding": text,
            "group_id": text,
            "source": text,
            "license": text,
        }
    )


def make_image_rows(rows: list[dict[str, Any]]) -> Dataset:
    """A set of `ImagePreference` rows; columns that a row leaves out are null. Raises ValueError as `validate` does."""
    from datasets import Dataset

    features = image_preference()
    full = [{name: row.get(name) for name in features} for row in rows]
    unknown = sorted({key for row in rows for key in row} - set(features))
    if unknown:
        raise ValueError(f"column {unknown[0]!r} is not part of ImagePreference; known: {', '.join(features)}")
    return validate(Dataset.from_list(full, features=features), where="rows")


def load_pairs(path: str, *, where: str | None = None) -> Dataset:
    """An image preference set from a Parquet file, a folder of them, a set saved by `datasets`, or the hub.

    Raises ValueError that names the set, the row and the fix where it is missing, empty or not valid.
    """
    from dpo_mm.assets import resolve_asset

    return validate(_open(resolve_asset(path)), where=where or path)


def load_responses(path: str) -> Dataset:
    """A set of `ResponsePreference` rows, from where `load_pairs` takes its own.

    Raises ValueError that names the set and the fix where it is missing, empty or lacks a column.
    """
    from dpo_mm.assets import resolve_asset

    rows = _open(resolve_asset(path))
    _require_columns(rows, ("prompt", "chosen", "rejected"), path)
    return _with_ids(rows)


def make_response_rows(rows: list[dict[str, Any]]) -> Dataset:
    """A set of `ResponsePreference` rows; columns that a row leaves out are null, texts become messages.

    Raises ValueError for a column that is not part of it.
    """
    from datasets import Dataset

    features = response_preference()
    unknown = sorted({key for row in rows for key in row} - set(features))
    if unknown:
        raise ValueError(f"column {unknown[0]!r} is not part of ResponsePreference; known: {', '.join(features)}")
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    full = [
        {name: _as_message(row.get(name), roles[name]) if name in roles else row.get(name) for name in features}
        for row in rows
    ]
    return Dataset.from_list(full, features=features)


def _as_message(content: Any, role: str) -> Any:
    return [{"role": role, "content": [{"type": "text", "text": content}]}] if isinstance(content, str) else content


def _open(path: str) -> Dataset:
    from datasets import load_dataset, load_from_disk

    folder = Path(path)
    if (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        return load_from_disk(str(folder))  # type: ignore[return-value]
    if folder.is_file() or folder.is_dir():
        files = [folder] if folder.is_file() else sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(
                f"{path}: no *.parquet in this folder; a preference set is Parquet with columns {', '.join(REQUIRED)}"
            )
        try:
            return _read_parquet(files)
        except Exception as error:
            raise ValueError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
    if path.count("/") != 1 or path.startswith((".", "/")) or folder.suffix:
        raise ValueError(
            f"{path}: no such file or folder; give a Parquet file, a folder of them, a shipped set or a hub id"
        )
    return load_dataset(path, split="train")  # type: ignore[return-value]


def _read_parquet(files: list[Path]) -> Dataset:
    """Small sets straight into memory, large ones through the cache of `datasets`, mapped from disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        return Dataset.from_parquet([str(file) for file in files])  # type: ignore[return-value]
    return Dataset(pa.concat_tables([pq.read_table(file) for file in files], promote_options="default"))


def validate(rows: Dataset, *, where: str) -> Dataset:
    """The same rows with every column of `ImagePreference`, checked but for the images' bytes.

    Raises ValueError that names the set, the column or row, what was expected, and the likely fix.
    """
    from datasets import Image

    _require_columns(rows, REQUIRED, where)
    for number, (preference, prompt) in enumerate(zip(rows["preference"], rows["prompt"], strict=True)):
        if preference not in PREFERENCES:
            raise ValueError(
                f"{where}, row {number}: preference is {preference!r}; expected one of {', '.join(PREFERENCES)}"
            )
        if not isinstance(prompt, str):
            raise ValueError(f"{where}, row {number}: prompt is {prompt!r}; expected text")
    for column in ("image_a", "image_b", *(["image_source"] if "image_source" in rows.column_names else [])):
        held = rows.features[column]
        try:
            rows = rows.cast_column(column, Image())
        except Exception as error:  # Arrow has a kind of its own for each pair of types
            raise ValueError(
                f"{where}: column {column!r} holds {held}; expected pictures, as {{bytes, path}} or as paths"
            ) from error
    return _complete(rows)


def _require_columns(rows: Dataset, columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            spare = [name for name in rows.column_names if name not in columns]
            close = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
            hint = f"; is it {close[0]!r}? rename it" if close else f"; expected {', '.join(columns)}"
            raise ValueError(f"{where}: column {column!r} is missing (has {', '.join(rows.column_names)}){hint}")
    if len(rows) == 0:
        raise ValueError(f"{where}: the set is empty; expected at least one pair")


def _complete(rows: Dataset) -> Dataset:
    """Columns that are not there are null; rows without an id are called by their number."""
    import pyarrow as pa
    from datasets import Dataset, Features, concatenate_datasets

    wanted = image_preference()
    missing = Features({name: wanted[name] for name in wanted if name not in (*rows.column_names, "id")})
    if missing:  # all at once: each change of a Dataset takes milliseconds
        nulls = pa.table({name: pa.nulls(len(rows), feature.pa_type) for name, feature in missing.items()})
        rows = concatenate_datasets([rows, Dataset(nulls.cast(missing.arrow_schema))], axis=1)
    return _with_ids(rows)


def _with_ids(rows: Dataset) -> Dataset:
    """Rows without an id are called by their number."""
    given = list(rows["id"]) if "id" in rows.column_names else [None] * len(rows)
    if all(isinstance(value, str) for value in given):
        return rows
    names = [str(number) if value is None else str(value) for number, value in enumerate(given)]
    rows = rows.remove_columns([name for name in ("id",) if name in rows.column_names])
    return rows.add_column("id", names)  # type: ignore[arg-type]


def drop_ties(rows: Dataset) -> Dataset:
    """The rows where one side won; ties and both-bad rows are left out. Raises ValueError where none remains."""
    kept = [n for n, preference in enumerate(rows["preference"]) if preference in ("a", "b")]
    if not kept:
        raise ValueError(
            f"none of the {len(rows)} pairs has a winner (all are ties or both_bad); nothing to learn from"
        )
    return rows.select(kept)


def digest(rows: Dataset) -> str:
    """What a set says, in 16 hex digits: its texts and labels in order, and its pictures by their size in bytes."""
    import pyarrow.compute as pc

    found, plain = hashlib.sha256(), rows.with_format("arrow")
    for name in sorted(rows.column_names):
        column = plain[name][:]  # type: ignore[call-overload]
        if str(column.type).startswith("struct<bytes"):
            column = pc.binary_length(pc.struct_field(column, "bytes"))
        found.update(f"{name} {column.to_pylist()!r}".encode())
    return found.hexdigest()[:16]


def split_by_prompt(rows: Dataset, fraction: float, *, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training rows and rows to watch, whole prompts apart, about `fraction` of the prompts; None where too few.

    A prompt with images is another prompt with other images.
    """
    import numpy as np

    prompts = [str(prompt) for prompt in rows["prompt"]]
    for column in {"images", "image_source"} & set(rows.column_names):
        pictures = rows.select_columns(column).with_format("arrow")[column].to_pylist()
        digests = [hashlib.sha256(repr(images).encode()).hexdigest() for images in pictures]
        prompts = [f"{digest} {prompt}" for digest, prompt in zip(digests, prompts, strict=True)]
    names = sorted(set(prompts))
    count = int(len(names) * fraction)
    if count == 0:
        return rows, None
    apart = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    inside = [n for n, prompt in enumerate(prompts) if prompt not in apart]
    return rows.select(inside), rows.select([n for n, prompt in enumerate(prompts) if prompt in apart])
