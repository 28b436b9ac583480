"""Messages of a conversation: parts of text and images, and the checks that nothing else is lost on the way.

A message is `{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`. Its images are in the row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
PLACEHOLDER = re.compile(r"\n?<image>\n?")


def as_messages(content: Any, role: str) -> list[Message]:
    """Convert a text, a message or messages to messages whose content is a list of parts.

    Args:
        content: a text, a message or a list of messages in the chat format.
        role: role of the message if content is a text.

    Raises:
        ValueError: if a message has no content, calls tools, or has a part that is neither text nor image.
    """
    if isinstance(content, str):
        content = [{"role": role, "content": content}]
    if not isinstance(content, list | tuple | dict):
        raise ValueError(f"{content!r} is neither text nor a list of messages")
    return [_message(message) for message in ([content] if isinstance(content, dict) else content)]


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ValueError("a message has no role and content")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError("a message calls tools")
    content = message["content"]
    if content is None:
        raise ValueError("a message has no content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
    return {"role": message["role"], "content": parts}


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image" and not any(part.get(name) for name in ("image", "url", "path", "base64", "image_url")):
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        raise ValueError("an image is inside a message. Images must be in the column images")
    raise ValueError(f"a part of a message has the type {kind!r}. Only text and image are supported")


def count_image_parts(messages: Sequence[Message]) -> int:
    """Number of image parts of a conversation."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def place_images(messages: Sequence[Message], images: int) -> list[Message] | None:
    """Give a conversation one image part per image.

    Image parts are left in their place. Without any, every `<image>` in the texts becomes one. Without any of both, the
    images come first in the first message of the user.

    Args:
        messages: the conversation.
        images: number of images.

    Returns:
        New messages, or None if the number of parts or placeholders is wrong, or there is no user message for the images.
    """
    if images and not count_image_parts(messages):
        messages = [{**message, "content": _split_at_placeholders(message["content"])} for message in messages]
    messages = [{**message, "content": list(message["content"])} for message in messages]
    parts = count_image_parts(messages)
    first = next((message for message in messages if message["role"] == "user"), None)
    if parts not in (0, images) or (images and parts == 0 and first is None):
        return None
    if parts == 0 and first is not None:
        first["content"] = [{"type": "image"} for _ in range(images)] + first["content"]
    return messages


def _split_at_placeholders(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    split: list[dict[str, Any]] = []
    for part in parts:
        pieces = PLACEHOLDER.split(part["text"]) if part["type"] == "text" else []
        if len(pieces) < 2:
            split.append(part)
            continue
        for number, piece in enumerate(pieces):
            split += [{"type": "image"}] if number else []
            split += [{"type": "text", "text": piece}] if piece.strip() else []
    return split


def response_of(content: Any, prompt: Sequence[Message]) -> list[Message]:
    """Return the one message of the assistant that a response consists of.

    Args:
        content: a text, or messages. A whole conversation that begins with the prompt is cut to what follows it.
        prompt: messages of the prompt.

    Raises:
        ValueError: if what follows the prompt is not one text by the assistant.
    """
    messages = as_messages(content, "assistant")
    if len(messages) > len(prompt) and [_words(message) for message in messages[: len(prompt)]] == [
        _words(message) for message in prompt
    ]:
        messages = messages[len(prompt) :]
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise ValueError(f"the response has messages of {', '.join(roles) or 'nobody'}. Expected one of the assistant")
    if count_image_parts(messages):
        raise ValueError("the response contains an image. Expected text")
    return messages


def _words(message: Message) -> tuple[str, str]:
    return message["role"], "".join(part.get("text") or "" for part in message["content"]).strip()
