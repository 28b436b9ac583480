"""Check the columns of numbers that training reads: their type, and the range of each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

RANGES = {
    "p_a": (0.0, 1.0),
    "probability": (0.0, 1.0),
    "votes_a": (0.0, math.inf),
    "votes_b": (0.0, math.inf),
    "score_a": (-math.inf, math.inf),
    "score_b": (-math.inf, math.inf),
    "score_gap": (-math.inf, math.inf),
}
"""Columns of numbers that training reads, and their range. NaN and infinity are refused in all of them."""


def check_numbers(rows: Dataset, *, dataset_name: str) -> Dataset:
    """Return rows whose columns of RANGES are numbers.

    Args:
        rows: rows of a preference dataset.
        dataset_name: the dataset, for the error.

    Raises:
        ValueError: if a value is not a number or out of its range. It names the row.
    """
    import numpy as np
    from datasets import Value

    columns = sorted(RANGES.keys() & set(rows.column_names))
    features = rows.features
    for column in columns:
        kind = "int64" if column.startswith("votes") else "float64"
        if getattr(features[column], "dtype", None) != kind:
            try:
                rows = rows.cast_column(column, Value(kind))
            except Exception as error:  # Arrow raises a different class for each pair of types
                raise ValueError(
                    f"{dataset_name}: column {column!r} contains {features[column]}. Expected {_range(column)} per row"
                ) from error
    table = rows.select_columns(columns).with_format("arrow")[:]
    for column in columns:
        low, high = RANGES[column]
        values = table[column].fill_null(0).to_numpy().astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(values) | (values < low) | (values > high))
        if len(wrong):
            raise ValueError(
                f"{dataset_name}, row {wrong[0]}: {column} is {values[wrong[0]]:g}. Expected {_range(column)}, or null if it is "
                "unknown"
            )
    return rows


def _range(column: str) -> str:
    low, high = RANGES[column]
    return "a finite number" if low < 0 else f"a number of at least 0{' and at most 1' if high == 1 else ''}"
