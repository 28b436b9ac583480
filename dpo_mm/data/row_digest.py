"""Hash of a dataset by its content: texts, labels, and the bytes of images, also of those given as paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_mm.data.image_files import image_bytes
from dpo_mm.files.content_key import content_hash

if TYPE_CHECKING:
    from datasets import Dataset


def digest(rows: Dataset) -> str:
    """Hash a dataset to 32 hex digits: its texts, labels and images in order. An image given as a path is read."""
    return content_hash(row_digests(rows))


def row_digests(rows: Dataset, recorded: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Hash each row of a dataset to 32 hex digits.

    Args:
        rows: the dataset.
        recorded: entries with a `row` id and the `digests` of the rows with it, which count instead of the rows. A run
            records them for rows whose image it dropped.
    """
    batches = rows.with_format("arrow").iter(256)
    digests = [content_hash(_with_image_bytes(row)) for batch in batches for row in batch.to_pylist()]
    for record in recorded:
        numbers = [number for number, name in enumerate(rows["id"]) if name == record["row"]]
        for number, value in zip(numbers, record["digests"], strict=False):
            digests[number] = value
    return digests


def _with_image_bytes(value: Any) -> Any:
    """Replace every image of a row by the bytes of its file."""
    if isinstance(value, dict):
        is_image = value.keys() == {"bytes", "path"} and (value["bytes"] or value["path"])
        return image_content(value) if is_image else {name: _with_image_bytes(part) for name, part in value.items()}
    return [_with_image_bytes(part) for part in value] if isinstance(value, list) else value


def image_content(image: dict[str, Any]) -> bytes:
    """Return the bytes of an image, or its path if it cannot be read: decoding refuses such a row by its number."""
    try:
        return image_bytes(image)
    except (OSError, TypeError, ValueError):
        return str(image.get("path")).encode()
