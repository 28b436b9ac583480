"""Build chat messages from questions and responses. Images are parts of a message, not `<image>` in a text."""

from __future__ import annotations

import re
from typing import Any

PLACEHOLDER = re.compile(r"\n?<image>\n?")
ROLES = {"human": "user", "gpt": "assistant"}
Message = dict[str, Any]


def user_message(text: str, images: int) -> list[Message] | None:
    """Build the user's message of a question.

    Args:
        text: the question, with one `<image>` per image, or none. Without any, the images come first.
        images: number of images.

    Returns:
        One message, or None if the number of `<image>` placeholders is wrong.
    """
    pieces = PLACEHOLDER.split(text)
    if len(pieces) - 1 not in (0, images):
        return None
    if len(pieces) == 1:
        return [{"role": "user", "content": [_image_part() for _ in range(images)] + [_text_part(text)]}]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [_image_part()] if number else []
        parts += [_text_part(piece)] if piece.strip() else []
    return [{"role": "user", "content": parts}]


def assistant_message(text: str) -> list[Message]:
    """Build the assistant's message of a response."""
    return [{"role": "assistant", "content": [_text_part(text)]}]


def to_messages(conversation: Any) -> list[Message]:
    """Convert turns of ShareGPT (`from`, `value`) or OpenAI (`role`, `content`) to messages.

    Raises:
        KeyError: if a turn has neither format.
    """
    messages = []
    for turn in [conversation] if isinstance(conversation, dict) else conversation:
        sharegpt = "from" in turn
        role, content = (turn["from"], turn["value"]) if sharegpt else (turn["role"], turn["content"])
        parts = [_text_part(content)] if isinstance(content, str) else [_part(part) for part in content]
        messages.append({"role": ROLES.get(role, role), "content": parts})
    return messages


def insert_image_parts(messages: list[Message], images: int) -> list[Message] | None:
    """Replace every `<image>` in the texts by an image part.

    Args:
        messages: the conversation. Without any `<image>` or image part, the images come first in the user's first message.
        images: number of images.

    Returns:
        The messages, or None if the number of image parts is wrong or there is no user's message for the images.
    """
    converted: list[Message] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            count = len(PLACEHOLDER.findall(part["text"] or "")) if part["type"] == "text" else 0
            parts += user_message(part["text"], count)[0]["content"] if count else [part]  # type: ignore[index]
        converted.append({**message, "content": parts})
    image_parts = sum(part["type"] == "image" for message in converted for part in message["content"])
    first = next((message for message in converted if message["role"] == "user"), None)
    if image_parts == 0 and images and first is not None:
        first["content"] = [_image_part() for _ in range(images)] + first["content"]
    return converted if image_parts in (0, images) and (first is not None or not images) else None


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return _image_part() if part["type"] == "image" else _text_part(part.get("text") or "")


def _image_part() -> dict[str, Any]:
    return {"type": "image", "text": None}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
