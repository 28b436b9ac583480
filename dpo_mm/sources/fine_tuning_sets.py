"""Converters for rows with one image or response each: images with captions, and chats whose last response is the chosen one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dpo_mm.data import row_sides
from dpo_mm.errors import RowError
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row
from dpo_mm.sources.raw_rows import ORIGIN

CAPTIONS = ("text", "caption", "prompt")
"""Names of the column with an image's caption. The first is that of diffusers' training scripts."""
ASSISTANT = ("assistant", "gpt", "model", "bot")
LIKED = (*row_sides.LIKED, "kto_tag")
"""Names of the column that is true for a liked row: ours, TRL's, LLaMA-Factory's."""
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def liked_of(row: Row, names: tuple[str, ...] = LIKED) -> bool | None:
    """Return whether a row is liked, or None if it has no column about it.

    Raises:
        RowError: if the cell is neither true nor false.
    """
    name = next((name for name in names if name in row), None)
    if name is None:
        return None
    liked = BOOLEANS.get(str(row[name]).strip().lower())
    if liked is None:
        raise RowError(f"{row[ORIGIN]}: {name} is {row[name]!r:.80}. Expected true or false")
    return liked


def captioned_images(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert images with captions.

    Columns: `file_name` or `image`, `text` (or `caption`, `prompt`) with a caption or a list of them, and `liked` if there are disliked images.
    """
    for row in rows:
        caption = next((row[name] for name in CAPTIONS if _is_caption(row.get(name))), None)
        if caption is None:
            yield LeftOut("it has no caption")
            continue
        name = str(row.get("id") or row.get("file_name") or row["_number"])
        sides = row_sides.one_image_sides(
            row.get("image") or row.get("file_name"), liked=liked_of(row, ("liked",)) is not False
        )
        yield {"id": name, "prompt": caption.strip() if isinstance(caption, str) else caption, **sides}


def _is_caption(cell: Any) -> bool:
    """Return True for a text with words, or a list of captions."""
    return bool(cell.strip()) if isinstance(cell, str) else isinstance(cell, list) and bool(cell)


def last_response(turns: Any) -> tuple[list[Any], list[Any]] | None:
    """Split a conversation before its last turn of the assistant. Later turns are left out.

    Returns:
        The turns before it, and the turn. None if there is no such turn, or nothing before it.
    """
    turns = list(turns)
    of_assistant = [n for n, turn in enumerate(turns) if turn.get("role", turn.get("from")) in ASSISTANT]
    if not of_assistant or of_assistant[-1] == 0:
        return None
    return turns[: of_assistant[-1]], [turns[of_assistant[-1]]]
