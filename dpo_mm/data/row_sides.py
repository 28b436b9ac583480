"""Rows with one image or response each: only chosen ones, or liked and disliked ones, as rows of the schemas.

A row of `image, prompt` becomes `image_a` that wins against nothing. A row of `prompt, chosen`, or of `prompt, completion` (TRL's
name), has no rejected side. With a column `liked` or `label` (true or false), a disliked image loses against nothing, and a
disliked response becomes the rejected side.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

LIKED = ("liked", "label")
"""Names of the column that is true for a liked row and false for a disliked one. The second is TRL's."""
RESPONSE = ("completion", "response")
"""Names of the column with the only response of a row. The first is TRL's."""


def image_sides(rows: Dataset, dataset_name: str) -> Dataset:
    """Return rows of `image` with `image_a` and `preference` instead. Rows of pairs are returned unchanged.

    Raises:
        ValueError: if a row is neither liked nor disliked.
    """
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, Features, Image, Value, concatenate_datasets

    if not has_one_image(rows.column_names):
        return rows
    rows = rows.rename_column("image", "image_a")
    name = _liked_column(rows)
    winners = np.full(len(rows), "a")
    if name:
        winners = np.where(_liked(rows, name, dataset_name), "a", "b")
        rows = rows.remove_columns(name)
    features = Features({"image_b": Image(), "preference": Value("string")})
    nothing = pa.nulls(len(rows), features["image_b"].pa_type)
    added = pa.table({"image_b": nothing, "preference": pa.array(winners.tolist(), pa.string())})
    return concatenate_datasets([rows, Dataset(added.cast(features.arrow_schema))], axis=1)


def response_sides(rows: Dataset, dataset_name: str) -> Dataset:
    """Return rows of one response with `chosen` and `rejected` instead. Rows of pairs are returned unchanged.

    Raises:
        ValueError: if a row is neither liked nor disliked.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset, concatenate_datasets

    source = one_response(rows.column_names)
    if source is None:
        return rows
    response = rows.data.column(source).combine_chunks()
    nothing, name = pa.nulls(len(rows), response.type), _liked_column(rows) if source in RESPONSE else None
    sides = {"chosen": response, "rejected": nothing}
    if name:
        liked = pa.array(_liked(rows, name, dataset_name))
        sides = {"chosen": pc.if_else(liked, response, nothing), "rejected": pc.if_else(liked, nothing, response)}
    rest = rows.remove_columns([column for column in (source, name) if column])
    return concatenate_datasets([rest, Dataset(pa.table(sides))], axis=1)


def has_one_image(columns: Sequence[str]) -> bool:
    """Return True if rows with these columns have one image each, and no conversation."""
    return "image" in columns and not {"image_a", "image_b", "preference", "chosen", *RESPONSE} & set(columns)


def one_response(columns: Sequence[str]) -> str | None:
    """Return the column with the only response of rows with these columns. None: they have pairs, or something else."""
    if "rejected" in columns or "prompt" not in columns:
        return None
    if "chosen" in columns:
        others = [name for name in columns if not name.startswith(("rejected_", "chosen"))]
        return None if difflib.get_close_matches("rejected", others, n=1, cutoff=0.5) else "chosen"
    return next((name for name in RESPONSE if name in columns), None)


def one_image_sides(image: Any, *, liked: bool) -> dict[str, Any]:
    """Return the columns of a row with one image: it wins or loses against nothing."""
    return {"image_a": image, "preference": "a" if liked else "b"}


def row_with_sides(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row as `image_sides` and `response_sides` return rows. Only false makes it disliked."""
    liked = not any(row.get(name) is False for name in LIKED)
    if has_one_image(list(row)):
        rest = {name: value for name, value in row.items() if name not in ("image", *LIKED)}
        return {**rest, "image_b": None, **one_image_sides(row["image"], liked=liked)}
    source = one_response(list(row))
    if source is None:
        return dict(row)
    liked = liked or source == "chosen"
    rest = {name: value for name, value in row.items() if name not in (source, *LIKED)}
    return {**rest, "chosen": row[source] if liked else None, "rejected": None if liked else row[source]}


def _liked_column(rows: Dataset) -> str | None:
    """Name of the column of LIKED. A `label` of another type than bool, such as a class, is not one."""
    names = [name for name in LIKED if name in rows.column_names]
    return next((name for name in names if name == LIKED[0] or _type(rows, name) == "bool"), None)


def _type(rows: Dataset, name: str) -> str:
    return str(rows.data.column(name).type)


def _liked(rows: Dataset, name: str, dataset_name: str) -> list[bool]:
    column: pa.ChunkedArray = rows.data.column(name)
    values = column.to_pylist()
    wrong = next((number for number, value in enumerate(values) if not isinstance(value, bool)), None)
    if wrong is not None:
        raise ValueError(f"{dataset_name}, row {wrong}: {name} is {values[wrong]!r}. Expected true or false")
    return values
