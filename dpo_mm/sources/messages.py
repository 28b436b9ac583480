"""Build chat messages from the turns of a dataset. Images become parts of a message and cells of the row."""

from __future__ import annotations

from typing import Any

from dpo_mm.data.conversation import Message, as_messages, place_images

IMAGE_SOURCES = ("image", "image_url", "url", "path", "base64")
"""Keys of an image part that contain the image itself or its address."""


def user_message(text: str, images: int) -> list[Message] | None:
    """Build the user's message of a question.

    Args:
        text: the question, with one `<image>` per image, or none. Without any, the images come first.
        images: number of images.

    Returns:
        One message, or None if the number of `<image>` placeholders is wrong.
    """
    return place_images(as_messages(text, "user"), images)


def assistant_message(text: str) -> list[Message]:
    """Build the assistant's message of a response."""
    return as_messages(text, "assistant")


def to_messages(conversation: Any, images: list[Any] | None = None) -> list[Message]:
    """Convert turns of ShareGPT (`from`, `value`) or OpenAI (`role`, `content`) to messages.

    Args:
        conversation: one turn or a list of turns.
        images: list to which the images inside the turns are added, as cells: paths, URLs or data URIs. None if they may
            have none.

    Raises:
        ValueError: if a turn would lose content, such as a video, a call of a tool or an image for which there is no list.
            The error is the reason to leave the row out.
    """
    turns = [conversation] if isinstance(conversation, dict) else conversation
    converted = []
    for turn in turns if isinstance(turns, list | tuple) else [turns]:
        if not isinstance(turn, dict):
            raise ValueError("a turn of its conversation is not an object")
        turn = {**turn, "role": turn["from"], "content": turn["value"]} if "from" in turn else turn
        content = turn.get("content")
        if images is not None and isinstance(content, list):
            content = [_without_source(part, images) for part in content]
        converted.append({**turn, "role": turn.get("role"), "content": content})
    return as_messages(converted, "user")


def _without_source(part: Any, images: list[Any]) -> Any:
    """Part of a message with its image in the list."""
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url", "input_image"):
        return part
    cell = next((part[name] for name in IMAGE_SOURCES if part.get(name)), None)
    if cell is None:
        return part
    images.append(cell["url"] if isinstance(cell, dict) and cell.get("url") else cell)
    return {"type": "image"}
