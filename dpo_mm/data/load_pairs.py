"""Decode the images of pairs for encoding, and derive the columns that objectives use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.data import image_files
from dpo_mm.data.schema import prompt_images
from dpo_mm.objectives import DATASET_INPUTS
from dpo_mm.resumable import explain_unwritten

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image


SAME_PROPORTIONS = 0.05
"""Largest difference of the logarithms of two aspect ratios that counts as none."""
ROWS_IN_MEMORY = 16
"""Rows whose image files are read at once."""


@dataclass(frozen=True)
class Pairs:
    """Decided rows of `image_preference` with undecoded images.

    Args:
        rows: rows in which a or b wins.
        dataset_name: name of the dataset, for errors.
        undecodable_images: raise | drop. Dropped rows are listed in the file `dropped_rows_file`.
        dropped_rows_file: JSON-lines file for dropped rows.
        with_source: True if the model edits an image. Then the image to edit is decoded too.
        one_sided: True to decode one image per row: the chosen one or, if there is none, the other one.
    """

    rows: Dataset
    dataset_name: str
    undecodable_images: str
    dropped_rows_file: Path
    with_source: bool = False
    one_sided: bool = False

    def decode(self, part: range) -> Iterator[dict[str, Any]]:
        """Yield these rows with their `number` and their decoded images in `images`.

        The images are the chosen one, the rejected one and, for a model that edits, the image to edit. `number` is the row's
        position in `rows`.

        Raises:
            ValueError: if an image does not decode and undecodable_images is "raise".
        """
        for number, row in zip(part, undecoded_rows(self.rows.select(part)), strict=True):
            columns = ["image_a", "image_b"] if row["preference"] == "a" else ["image_b", "image_a"]
            if self.one_sided:
                columns = [column for column in columns if row[column] is not None][:1]
            columns += ["image_source"] if self.with_source else []
            images: list[Any] = []
            for column in columns:
                try:
                    images.append(image_files.rgb_image(row[column]))
                except ValueError as reason:
                    error = UndecodableImageError(self.dataset_name, row["id"], column, with_file(reason, row[column]))
                    if self.undecodable_images == "raise":
                        raise error from None
                    listed = self.dropped_rows_file
                    with explain_unwritten(listed), listed.open("a", encoding="utf-8") as file:
                        file.write(error.as_json_line())
                    break
            if len(images) == len(columns):
                yield {**row, "number": number, "images": images}


class UndecodableImageError(ValueError):
    """An image of a row that is missing or does not decode.

    Args:
        dataset_name: name of the dataset.
        row: id of the row.
        column: column of the image.
        reason: why it does not decode.
    """

    def __init__(self, dataset_name: str, row: str, column: str, reason: Exception) -> None:
        self.dataset_name, self.row, self.column, self.reason = dataset_name, row, column, str(reason)
        super().__init__(
            f"row {row} of {dataset_name}: {column} does not decode ({reason}). "
            "Fix the file, or train with undecodable_images: drop"
        )

    def as_json_line(self) -> str:
        """Return the line for the list of dropped rows."""
        return json.dumps({"row": self.row, "column": self.column, "reason": self.reason}) + "\n"

    @classmethod
    def from_json_line(cls, line: str, dataset_name: str) -> UndecodableImageError:
        """Restore the error from `as_json_line`."""
        entry = json.loads(line)
        return cls(dataset_name, entry["row"], entry["column"], ValueError(entry["reason"]))


def undecoded_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield rows with their image files as stored. Rows of other iterables than a dataset are yielded unchanged."""
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        yield from rows
        return
    undecoded = UndecodedRows(rows)
    for start in range(0, len(rows), ROWS_IN_MEMORY):
        yield from undecoded.read(range(start, min(start + ROWS_IN_MEMORY, len(rows))))


class UndecodedRows:
    """Rows of a dataset with their image files as stored, by number."""

    def __init__(self, rows: Dataset) -> None:
        from datasets import Image, List

        self.image_columns = [
            name
            for name, feature in rows.features.items()
            if isinstance(feature.feature if isinstance(feature, List) else feature, Image)
        ]
        self.images = rows.select_columns(self.image_columns).with_format("arrow")
        self.others = rows.remove_columns(self.image_columns)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return next(self.read(range(number, number + 1)))

    def read(self, part: range) -> Iterator[dict[str, Any]]:
        """Yield the rows of these numbers. Their image files are read at once."""
        cells = self.images[part.start : part.stop].to_pylist() if self.image_columns else [{}] * len(part)
        for number, files in zip(part, cells, strict=True):
            yield {**(self.others[number] if self.others.column_names else {}), **files}


def decode_prompt_images(row: Mapping[str, Any], dataset_name: str) -> list[Image.Image]:
    """Decode the images of a row of `response_preference` to RGB.

    Args:
        row: the row, with image files, Pillow images or no images.
        dataset_name: name of the dataset, for errors.

    Raises:
        UndecodableImageError: if an image is missing or does not decode.
    """
    images = []
    for number, cell in enumerate(prompt_images(row)):
        try:
            images.append(image_files.rgb_image(cell))
        except ValueError as reason:
            error = UndecodableImageError(dataset_name, str(row["id"]), f"image {number}", with_file(reason, cell))
            raise error from None
    return images


def with_file(reason: Exception, cell: Any) -> Exception:
    """Return the reason why an image does not decode, with the path of its file if it is not in the row itself."""
    path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else None
    return reason if not path or str(path) in str(reason) else ValueError(f"{path}: {reason}")


def has_source_images(rows: Dataset) -> list[bool]:
    """Return for each row of `image_preference` if it has an image to edit."""
    tables = rows.select_columns("image_source").with_format("arrow").iter(1000)
    return [valid for table in tables for valid in table["image_source"].is_valid().to_pylist()]


def check_source_images(
    rows: Dataset, dataset_name: str, *, pipeline: str, is_image_editing: bool, edits_optionally: bool = False
) -> bool:
    """Check that rows have a source image if, and only if, the model edits images.

    Args:
        rows: decided rows of `image_preference`.
        dataset_name: name of the dataset, for errors.
        pipeline: name of the model's pipeline, for errors.
        is_image_editing: True if the model edits an image.
        edits_optionally: True if the model takes rows that all have a source image, or none of them.

    Returns:
        True if the source images are used.

    Raises:
        ValueError: if a model that edits gets a row without `image_source`, or another model gets one with it.
    """
    has_source = has_source_images(rows)
    is_editing = any(has_source) if edits_optionally else is_image_editing
    if is_editing and not all(has_source):
        reason = "Other rows have an image to edit" if edits_optionally else f"{pipeline} edits an image"
        raise ValueError(
            f"row {rows['id'][has_source.index(False)]} of {dataset_name}: image_source is missing. {reason}, so every row needs the "
            "image to edit"
        )
    if any(has_source) and not is_editing:
        raise ValueError(
            f"{dataset_name}: rows have an image_source, which {pipeline} does not use. Drop the column, or train a model that edits"
        )
    return is_editing


def check_source_proportions(rows: Sequence[dict[str, Any]], size: tuple[int, int], dataset_name: str) -> None:
    """Check that images to edit have the proportions of their chosen images, so that both are cropped alike.

    A chosen image of the target size may be the model's own. It then edits the cropped source, whatever that was.

    Args:
        rows: rows of `Pairs.decode`, the image to edit last.
        size: width and height to which the images are fitted.
        dataset_name: name of the dataset, for the error.

    Raises:
        ValueError: if a source has other proportions.
    """
    for row in rows:
        chosen, source = row["images"][0].size, row["images"][-1].size
        if chosen != size and abs(math.log(source[0] * chosen[1] / (source[1] * chosen[0]))) > SAME_PROPORTIONS:
            raise ValueError(
                f"row {row['id']} of {dataset_name}: image_source is {source[0]}x{source[1]}, but the chosen image is "
                f"{chosen[0]}x{chosen[1]}. Crop the source to the proportions of its edit"
            )


def data_columns(rows: Dataset) -> dict[str, list[float]]:
    """Return the columns of DATASET_INPUTS that every row can fill, one value per row.

    `probability` is the probability that the chosen side is better. `score_margin` is its lead in the judge's score.
    """
    columns = {"probability": _probability, "score_margin": _score_margin}
    assert set(columns) == set(DATASET_INPUTS)
    plain = rows.select_columns(["preference", "p_a", "votes_a", "votes_b", "score_a", "score_b"])
    values_of = {name: [function(row) for row in plain] for name, function in columns.items()}
    return {
        name: [value for value in values if value is not None]
        for name, values in values_of.items()
        if None not in values
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
