"""Columns of a table of response pairs that contain part of a conversation, but are not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("images", "image")
MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
IMAGES_ELSEWHERE = ("img", "imgs", "image_path", "image_paths", "image_url", "image_urls")


def check_columns_are_read(rows: Dataset, path: str) -> None:
    """Check that no part of a conversation is in a column which is not read.

    Args:
        rows: rows with prompt, chosen and rejected.
        path: the dataset, the start of the error.

    Raises:
        ValueError: if a column has videos or audio, a system prompt, or images under another name.
    """
    for name, feature in rows.features.items():
        if name in IMAGE_COLUMNS:
            continue
        kind = _kind(feature)
        if name in MEDIA_COLUMNS or kind in ("Video", "Audio"):
            reason = "has video or audio. Only text and image are supported. Remove the column"
        elif name in IMAGES_ELSEWHERE or kind == "Image":
            reason = "has images and is not read. Rename it to images, or remove it"
        elif name == "system":
            reason = "is not read. Make it a message of the prompt with `dpo-mm import trl`, or remove it"
        else:
            continue
        if any(cell.as_py() for chunk in rows.data.column(name).chunks for cell in chunk):
            raise ValueError(f"{path}: the column {name!r} {reason}")


def _kind(feature: Any) -> str:
    """Class of a column's cells, or of the items of its lists."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    stored = isinstance(inner, dict) and set(inner) == {"bytes", "path"}
    return "Image" if stored else type(inner).__name__
