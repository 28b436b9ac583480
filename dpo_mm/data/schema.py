"""Row schemas of preference datasets, as Arrow features, with loading and validation.

`ImagePreference` is two images of one prompt with their label, votes or scores. Chosen and rejected are derived late
(`drop_ties`), so that a tie never turns into a win. `ResponsePreference` is two responses to one prompt with its images.
Rows of one image or response have null on the other side, see `dpo_mm.data.row_sides`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.number_columns import check_numbers
from dpo_mm.data.response_columns import check_columns_are_read
from dpo_mm.data.row_digest import image_content
from dpo_mm.data.row_files import open_rows
from dpo_mm.data.row_sides import image_sides, response_sides
from dpo_mm.data.several_captions import first_captions

if TYPE_CHECKING:
    from datasets import Dataset, Features

PREFERENCES = ("a", "b", "tie", "both_bad")
REQUIRED = ("prompt", "image_a", "image_b", "preference")


class Response(NamedTuple):
    """A generated response: its text, its number of tokens, and True if it was truncated at the token limit."""

    text: str
    tokens: int
    hit_limit: bool


def image_preference(*, several_sources: bool = False) -> Features:
    """Return the features of `ImagePreference`.

    `p_a` is the probability that a wins, in [0, 1]. Votes and scores are null if unknown. `image_source` is the image to
    edit, for models that edit, or a list of them with `several_sources`. It is null for models that generate from text.
    """
    from datasets import Features, Image, List, Value

    text, number = Value("string"), Value("float64")
    return Features(
        {
            "id": text,
            "prompt": text,
            "image_a": Image(),
            "image_b": Image(),
            "image_source": List(Image()) if several_sources else Image(),
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
    """Return the features of `ResponsePreference`.

    They are TRL's conversational preference with images, and columns about the row's label and origin.
    `chosen_truncated` and `rejected_truncated` are true if the response was truncated, so no end-of-turn token follows it.
    `reason` says why it was rejected. `tools` are the JSON schemas of tools for the chat template, as JSON text.
    `probability` is that of chosen being better, in [0, 1]. `score_gap` is by how much, in the judge's unit.
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
            "chosen_truncated": Value("bool"),
            "rejected_truncated": Value("bool"),
            "tools": text,
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
    """Build a dataset of `ImagePreference` rows. Missing columns are null.

    Raises:
        ValueError: if a column is not part of ImagePreference, or as `validate`.
    """
    from datasets import Dataset

    several = any(isinstance(row.get("image_source"), list) for row in rows)
    features = image_preference(several_sources=several)
    full = [{name: row.get(name) for name in features} for row in rows]
    if several:
        full = [{**row, "image_source": source_cells(row)} for row in full]
    unknown = sorted({key for row in rows for key in row} - set(features))
    if unknown:
        raise ValueError(f"column {unknown[0]!r} is not part of ImagePreference. Known columns: {', '.join(features)}")
    return validate(Dataset.from_list(full, features=features), dataset_name="rows")


def load_pairs(path: str, *, dataset_name: str | None = None) -> Dataset:
    """Load an image preference dataset, with every column of `ImagePreference`.

    Args:
        path: a Parquet file, a folder of Parquet files, a folder saved by `datasets`, a hub id, or a bundled dataset.
        dataset_name: name of the dataset in errors. None: `path`.

    Raises:
        ValueError: if the dataset is missing, empty or not valid. The error names the row and the fix.
    """
    from dpo_mm.assets import resolve_asset

    return check_pairs(open_rows(resolve_asset(path)), dataset_name or path)


def check_pairs(rows: Dataset, dataset_name: str) -> Dataset:
    """Return image preference rows as `load_pairs` does.

    Args:
        rows: rows of pairs or of one image each.
        dataset_name: name of the dataset in errors.

    Raises:
        ValueError: if they are not valid.
    """
    return validate(first_captions(image_sides(rows, dataset_name), dataset_name), dataset_name=dataset_name)


def load_responses(path: str, *, dataset_name: str | None = None) -> Dataset:
    """Load a response preference dataset.

    Args:
        path: a Parquet file, a folder of Parquet files, a folder saved by `datasets`, a hub id, or a bundled dataset.
        dataset_name: name of the dataset in errors. None: `path`.

    Raises:
        ValueError: if the dataset is missing or empty, has no column prompt, chosen or rejected, or has a part of its
            conversations in a column that is not read.
    """
    from dpo_mm.assets import resolve_asset

    return check_responses(open_rows(resolve_asset(path)), dataset_name or path)


def check_responses(rows: Dataset, dataset_name: str) -> Dataset:
    """Return response preference rows as `load_responses` does.

    Args:
        rows: rows of pairs or of one response each.
        dataset_name: name of the dataset in errors.

    Raises:
        ValueError: if they are not valid.
    """
    rows = response_sides(rows, dataset_name)
    _require_columns(rows, ("prompt", "chosen", "rejected"), dataset_name)
    check_columns_are_read(rows, dataset_name)
    return _with_ids(check_numbers(rows, dataset_name=dataset_name))


def make_response_rows(rows: list[dict[str, Any]]) -> Dataset:
    """Build a dataset of `ResponsePreference` rows. Texts become messages, and missing columns are null.

    Raises:
        ValueError: if a column is not part of ResponsePreference.
    """
    from datasets import Dataset

    features = response_preference()
    unknown = sorted({key for row in rows for key in row} - set(features))
    if unknown:
        raise ValueError(
            f"column {unknown[0]!r} is not part of ResponsePreference. Known columns: {', '.join(features)}"
        )
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    full = [
        {name: _as_message(row.get(name), roles[name]) if name in roles else row.get(name) for name in features}
        for row in rows
    ]
    return Dataset.from_list(full, features=features)


def prompt_images(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a response pair's prompt: the column `images`, or the one of the column `image`."""
    cells = row.get("images")
    cells = row.get("image") if cells is None else cells
    return list(cells) if isinstance(cells, list | tuple) else [] if cells is None else [cells]


def _as_message(content: Any, role: str) -> Any:
    return [{"role": role, "content": [{"type": "text", "text": content}]}] if isinstance(content, str) else content


def validate(rows: Dataset, *, dataset_name: str) -> Dataset:
    """Check rows and return them with every column of `ImagePreference`. Images are not decoded.

    Raises:
        ValueError: if a column is missing, there is no row, or a preference, prompt or image column is not valid.
    """
    from datasets import Image, List

    _require_columns(rows, REQUIRED, dataset_name)
    for number, (preference, prompt) in enumerate(zip(rows["preference"][:], rows["prompt"][:], strict=True)):
        if preference not in PREFERENCES:
            raise ValueError(
                f"{dataset_name}, row {number}: preference is {preference!r}. Expected one of {', '.join(PREFERENCES)}"
            )
        if not isinstance(prompt, str):
            raise ValueError(f"{dataset_name}, row {number}: prompt is {prompt!r}. Expected text")
    features = rows.features  # each access copies them
    for column in ("image_a", "image_b", *(["image_source"] if "image_source" in rows.column_names else [])):
        feature = features[column]
        is_list = column == "image_source" and isinstance(feature, List)
        expected = List(Image()) if is_list else Image()
        if feature == expected:
            continue
        try:
            rows = rows.cast_column(column, expected)
        except Exception as error:  # Arrow raises a different class for each pair of types
            raise ValueError(
                f"{dataset_name}: column {column!r} contains {feature}. Expected images, as {{bytes, path}} or as paths"
            ) from error
    return _complete(check_numbers(rows, dataset_name=dataset_name))


def _require_columns(rows: Dataset, columns: tuple[str, ...], dataset_name: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            spare = [name for name in rows.column_names if name not in columns]
            close = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
            hint = f"Is it {close[0]!r}? Rename it" if close else f"Expected {', '.join(columns)}"
            raise ValueError(
                f"{dataset_name}: column {column!r} is missing (has {', '.join(rows.column_names)}). {hint}"
            )
    if len(rows) == 0:
        raise ValueError(f"{dataset_name}: the dataset is empty. Expected at least one pair")


def _complete(rows: Dataset) -> Dataset:
    """Add missing columns as nulls, and the row number as id for rows without one."""
    import pyarrow as pa
    from datasets import Dataset, Features, concatenate_datasets

    features = image_preference()
    missing = Features({name: features[name] for name in features if name not in (*rows.column_names, "id")})
    if missing:  # one concatenation, because each change of a Dataset takes milliseconds
        nulls = pa.table({name: pa.nulls(len(rows), feature.pa_type) for name, feature in missing.items()})
        rows = concatenate_datasets([rows, Dataset(nulls.cast(missing.arrow_schema))], axis=1)
    return _with_ids(rows)


def _with_ids(rows: Dataset) -> Dataset:
    """Add the row number as id for rows without one."""
    ids = rows["id"][:] if "id" in rows.column_names else [None] * len(rows)
    if all(isinstance(value, str) for value in ids):
        return rows
    names = [str(number) if value is None else str(value) for number, value in enumerate(ids)]
    rows = rows.remove_columns([name for name in ("id",) if name in rows.column_names])
    return rows.add_column("id", names)  # type: ignore[arg-type]


def drop_ties(rows: Dataset) -> Dataset:
    """Return the rows that have a winner, without ties and both_bad.

    Raises:
        ValueError: if no row has a winner.
    """
    decided = [n for n, preference in enumerate(rows["preference"]) if preference in ("a", "b")]
    if not decided:
        raise ValueError(
            f"none of the {len(rows)} pairs has a winner (all are ties or both_bad), so there is nothing to train on"
        )
    return rows.select(decided)


def split_by_prompt(rows: Dataset, fraction: float, *, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split rows into training rows and evaluation rows, so that no prompt and no prompt's image is in both.

    Rows with images in the prompt belong together if they share an image, by its content and not its file name. Other rows
    belong together if they have the same prompt.

    Args:
        rows: preference rows.
        fraction: fraction of the groups in the evaluation split, in [0, 1).
        seed: seed of the split.

    Returns:
        Training rows and evaluation rows. The latter are None if the fraction is less than one group.
    """
    import numpy as np

    groups = _groups(rows) if fraction else [""] * len(rows)
    names = sorted(set(groups))
    count = int(len(names) * fraction)
    if count == 0:
        return rows, None
    held_out = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    train = [n for n, group in enumerate(groups) if group not in held_out]
    return rows.select(train), rows.select([n for n, group in enumerate(groups) if group in held_out])


def _groups(rows: Dataset) -> list[str]:
    """Name of the group of each row, see `split_by_prompt`: a prompt, or the first of the images that link its rows."""
    prompts = [str(prompt) for prompt in rows["prompt"]]
    columns = sorted({"images", "image", "image_source"} & set(rows.column_names))
    if not columns:
        return prompts
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    keys: list[str] = []
    for batch in rows.select_columns(columns).with_format("arrow").iter(64):
        for cells in batch.to_pylist():
            images = [digest for column in columns for digest in _image_digests(cells[column])]
            first = images[0] if images else prompts[len(keys)]
            for other in images[1:]:
                one, two = sorted((root(first), root(other)))
                parents[two] = one
            keys.append(first)
    return [root(key) for key in keys]


def _image_digests(cell: Any) -> list[str]:
    """Hash the content of the images of one cell: one image, a list of them, or none."""
    images = [image for image in (cell if isinstance(cell, list) else [cell]) if image]
    return [hashlib.blake2b(image_content(image), digest_size=16).hexdigest() for image in images]
