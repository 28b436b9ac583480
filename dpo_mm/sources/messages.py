"""Questions and answers as messages: the places of images are parts, and never `<image>` in a text."""

from __future__ import annotations

import re
from typing import Any

MARK = re.compile(r"\n?<image>\n?")
ROLES = {"human": "user", "gpt": "assistant"}
Message = dict[str, Any]


def asked(text: str, images: int) -> list[Message] | None:
    """A question as one message of the user, `<image>` replaced by an image's place; None where they don't match.

    images: how many there are. Without any mark they come first.
    """
    pieces = MARK.split(text)
    if len(pieces) - 1 not in (0, images):
        return None
    if len(pieces) == 1:
        return [{"role": "user", "content": [_place() for _ in range(images)] + [_text(text)]}]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [_place()] if number else []
        parts += [_text(piece)] if piece.strip() else []
    return [{"role": "user", "content": parts}]


def said(text: str) -> list[Message]:
    """An answer as one message."""
    return [{"role": "assistant", "content": [_text(text)]}]


def turns(conversation: Any) -> list[Message]:
    """Turns of ShareGPT (`from`, `value`) or OpenAI (`role`, `content`) as messages, texts with their marks as they are.

    Raises KeyError for a turn that is neither.
    """
    found = []
    for turn in [conversation] if isinstance(conversation, dict) else conversation:
        sharegpt = "from" in turn
        role, content = (turn["from"], turn["value"]) if sharegpt else (turn["role"], turn["content"])
        parts = [_text(content)] if isinstance(content, str) else [_part(part) for part in content]
        found.append({"role": ROLES.get(role, role), "content": parts})
    return found


def placed(messages: list[Message], images: int) -> list[Message] | None:
    """Messages with every `<image>` of a user's text replaced by its place; None where images and places don't match."""
    out: list[Message] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            marks = len(MARK.findall(part["text"] or "")) if part["type"] == "text" else 0
            parts += asked(part["text"], marks)[0]["content"] if marks else [part]  # type: ignore[index]
        out.append({**message, "content": parts})
    places = sum(part["type"] == "image" for message in out for part in message["content"])
    first = next((message for message in out if message["role"] == "user"), None)
    if places == 0 and images and first is not None:
        first["content"] = [_place() for _ in range(images)] + first["content"]
    return out if places in (0, images) and (first is not None or not images) else None


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return _place() if part["type"] == "image" else _text(part.get("text") or "")


def _place() -> dict[str, Any]:
    return {"type": "image", "text": None}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
