"""Decode the images of pairs for encoding, and derive the columns that objectives use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.data import image_files
from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.schema import prompt_images
from dpo_mm.files.resumable import explain_unwritten

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
        with_source: True if the model edits images. Then the images to edit are decoded too.
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

        The images are the chosen one, the rejected one and, for a model that edits, the images to edit. `number` is the row's
        position in `rows`.

        Raises:
            ValueError: if an image does not decode and undecodable_images is "raise".
        """
        for number, row in zip(part, undecoded_rows(self.rows.select(part)), strict=True):
            columns = ["image_a", "image_b"] if row["preference"] == "a" else ["image_b", "image_a"]
            if self.one_sided:
                columns = [column for column in columns if row[column] is not None][:1]
            cells = [(column, row[column]) for column in columns]
            cells += [("image_source", cell) for cell in source_cells(row)] if self.with_source else []
            images: list[Any] = []
            for column, cell in cells:
                try:
                    images.append(image_files.rgb_image(cell))
                except ValueError as reason:
                    error = UndecodableImageError(self.dataset_name, row["id"], column, with_file(reason, cell))
                    if self.undecodable_images == "raise":
                        raise error from None
                    listed = self.dropped_rows_file
                    with explain_unwritten(listed), listed.open("a", encoding="utf-8") as file:
                        file.write(error.as_json_line())
                    break
            if len(images) == len(cells):
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


def has_source_lists(rows: Dataset) -> bool:
    """Return True if the column `image_source` has a list of images per row."""
    from datasets import List

    return isinstance(rows.features["image_source"], List)


def source_counts(rows: Dataset) -> list[int]:
    """Return the number of images to edit of each row of `image_preference`."""
    import pyarrow.compute as pc

    tables = rows.select_columns("image_source").with_format("arrow").iter(1000)
    lengths = lambda column: pc.fill_null(pc.list_value_length(column), 0)
    count = lengths if has_source_lists(rows) else pc.is_valid
    return [int(number) for table in tables for number in count(table["image_source"]).to_pylist()]


def check_source_images(
    rows: Dataset,
    dataset_name: str,
    *,
    pipeline: str,
    is_image_editing: bool,
    edits_optionally: bool = False,
    takes_several_sources: bool = False,
) -> bool:
    """Check that rows have source images if, and only if, the model edits images, and not more than it takes.

    Args:
        rows: decided rows of `image_preference`.
        dataset_name: name of the dataset, for errors.
        pipeline: name of the model's pipeline, for errors.
        is_image_editing: True if the model edits an image.
        edits_optionally: True if the model takes rows that all have a source image, or none of them.
        takes_several_sources: True if the model takes several images to edit per row.

    Returns:
        True if the source images are used.

    Raises:
        ValueError: if a model that edits gets a row without `image_source` or with too many, or another model gets one with it.
    """
    counts = source_counts(rows)
    is_editing = any(counts) if edits_optionally else is_image_editing
    if is_editing and not all(counts):
        reason = "Other rows have an image to edit" if edits_optionally else f"{pipeline} edits an image"
        raise ValueError(
            f"row {rows['id'][counts.index(0)]} of {dataset_name}: image_source is missing. {reason}, so every row needs the "
            "image to edit"
        )
    if any(counts) and not is_editing:
        raise ValueError(
            f"{dataset_name}: rows have an image_source, which {pipeline} does not use. Drop the column, or train a model that edits"
        )
    if is_editing and not takes_several_sources and max(counts) > 1:
        number = next(number for number, count in enumerate(counts) if count > 1)
        raise ValueError(
            f"row {rows['id'][number]} of {dataset_name}: image_source has {counts[number]} images, but {pipeline} takes 1. Remove the others"
        )
    return is_editing


def check_equal_sources(rows: Dataset, dataset_name: str) -> None:
    """Raise ValueError unless all rows of one image have equally many images to edit, because two kinds of them share a batch."""
    counts = source_counts(rows)
    number = next((number for number, count in enumerate(counts) if count != counts[0]), None)
    if number is not None:
        raise ValueError(
            f"row {rows['id'][number]} of {dataset_name}: {counts[number]} images to edit, but others have {counts[0]}. Rows of one "
            "image need equally many"
        )


def check_source_proportions(
    rows: Sequence[dict[str, Any]], size: tuple[int, int], dataset_name: str, *, sides: int
) -> None:
    """Check that images to edit have the proportions of their chosen images, so that both are cropped alike.

    A chosen image of the target size may be the model's own. It then edits the cropped source, whatever that was. Of several
    images to edit, the first is the one that is edited. The others may have other proportions.

    Args:
        rows: rows of `Pairs.decode`, whose images to edit follow the sides.
        size: width and height to which the images are fitted.
        dataset_name: name of the dataset, for the error.
        sides: number of images before the images to edit.

    Raises:
        ValueError: if a source has other proportions.
    """
    for row in rows:
        chosen, source = row["images"][0].size, row["images"][sides].size
        if chosen != size and abs(math.log(source[0] * chosen[1] / (source[1] * chosen[0]))) > SAME_PROPORTIONS:
            raise ValueError(
                f"row {row['id']} of {dataset_name}: image_source is {source[0]}x{source[1]}, but the chosen image is "
                f"{chosen[0]}x{chosen[1]}. Crop the source to the proportions of its edit"
            )


def data_columns(rows: Dataset) -> dict[str, list[float]]:
    """Return the columns of DATASET_INPUTS that every row can fill, one value per row.

    `probability` is the probability that the chosen side is better. `score_margin` is its lead in the judge's score.
    """
    from dpo_mm.objectives import DATASET_INPUTS  # it imports torch, which pages that show pairs do not need

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
