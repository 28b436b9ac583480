"""Pairs as they are encoded: pictures decoded, the side that won first, and what objectives take from the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.data import image_files
from dpo_mm.objectives import DATASET_INPUTS

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Pairs:
    """Decided rows of `image_preference`. undecodable_images: raise | skip, then noted in the quarantine file.

    edits: whether the picture to edit is wanted too.
    """

    rows: Dataset
    where: str
    undecodable_images: str
    quarantine: Path
    edits: bool = False

    def decoded(self, part: range) -> Iterator[dict[str, Any]]:
        """These rows with their `number` and `pictures`: the side that won, the other, and for a model that edits the source.

        Raises ValueError that names set, row and fix where one does not decode.
        """
        for number, row in zip(part, _undecoded(self.rows.select(part)), strict=True):
            sides = ["image_a", "image_b"] if row["preference"] == "a" else ["image_b", "image_a"]
            sides += ["image_source"] if self.edits else []
            found: list[Any] = []
            for column in sides:
                try:
                    found.append(image_files.decode_image(image_files.image_bytes(row[column])))
                except (ValueError, OSError) as error:
                    self._refuse(row["id"], column, error)
                    break
            if len(found) == len(sides):
                yield {**row, "number": number, "pictures": found}

    def _refuse(self, row: str, column: str, error: Exception) -> None:
        if self.undecodable_images == "raise":
            reason = f"row {row} of {self.where}: {column} does not decode ({error})"
            raise ValueError(f"{reason}; drop it with --undecodable-images skip") from None
        with self.quarantine.open("a") as file:
            file.write(json.dumps({"row": row, "column": column, "reason": str(error)}) + "\n")


def _undecoded(rows: Dataset) -> Dataset:
    from datasets import Image

    for column in ("image_a", "image_b", "image_source"):
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def check_sources(rows: Dataset, where: str, *, pipeline: str, is_image_editing: bool) -> None:
    """Raises ValueError where a model that edits has no picture to edit, or one that doesn't edit has some."""
    tables = rows.select_columns("image_source").with_format("arrow").iter(1000)
    given = [there for table in tables for there in table["image_source"].is_valid().to_pylist()]
    if is_image_editing and not all(given):
        raise ValueError(
            f"row {rows['id'][given.index(False)]} of {where}: image_source is missing; {pipeline} edits a picture, and rows for it bring it"
        )
    if any(given) and not is_image_editing:
        raise ValueError(
            f"{where}: rows have an image_source, which {pipeline} can't take; drop the column or train a model that edits"
        )


def data_columns(rows: Dataset) -> dict[str, list[float]]:
    """Columns of DATASET_INPUTS that every row can fill, in order: the winner's probability and the judged margin."""
    wanted = {"probability": _probability, "score_margin": _score_margin}
    assert set(wanted) == set(DATASET_INPUTS)
    plain = rows.select_columns(["preference", "p_a", "votes_a", "votes_b", "score_a", "score_b"])
    filled = {name: [function(row) for row in plain] for name, function in wanted.items()}
    return {
        name: [value for value in values if value is not None] for name, values in filled.items() if None not in values
    }


def _probability(row: dict[str, Any]) -> float | None:
    p = row["p_a"]
    if p is None and row["votes_a"] is not None and row["votes_b"] is not None and row["votes_a"] + row["votes_b"]:
        p = row["votes_a"] / (row["votes_a"] + row["votes_b"])
    if p is None:
        return None
    return p if row["preference"] == "a" else 1 - p


def _score_margin(row: dict[str, Any]) -> float | None:
    if row["score_a"] is None or row["score_b"] is None:
        return None
    difference = row["score_a"] - row["score_b"]
    return difference if row["preference"] == "a" else -difference
