"""Messages of a conversation: parts of text and images, and the checks that nothing else is lost on the way.

A message is `{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`. Its images are in the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
PLACEHOLDER = re.compile(r"\n?<image>\n?")
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of the roles."""
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "refusal")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Keys of a message that contain something which is not in its content."""
CALLS = ("tool_calls", "function_call")
UNSUPPORTED = frozenset(CALLS + THOUGHTS + MEDIA)


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
    if not UNSUPPORTED.isdisjoint(message):
        _check_unsupported(message)
    content = message["content"]
    if content is None:
        raise ValueError("a message has no content")
    if not isinstance(message["role"], str) or not isinstance(content, str | list | tuple):
        raise ValueError(
            f"a message has the role {message['role']!r:.40} and the content {content!r:.40}. Expected texts"
        )
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
    return {"role": ROLES.get(message["role"], message["role"]), "content": parts}


def _check_unsupported(message: Message) -> None:
    """Raise ValueError if a message contains more than its content."""
    if any(message.get(name) for name in CALLS):
        raise ValueError("a message calls tools")
    lost = [name for name in THOUGHTS + MEDIA if message.get(name)]
    if lost:
        raise ValueError(f"a message has {lost[0]}. Only its content is supported")


def _part(part: Any) -> dict[str, Any]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image" and not any(part.get(name) for name in ("image", "url", "path", "base64", "image_url")):
        return {"type": "image"}
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in TEXT_PARTS:
        raise ValueError("a text part of a message has no text")
    if kind == "image":
        raise ValueError("an image is inside a message. Images must be in the column images")
    raise ValueError(f"a part of a message has the type {kind!r}. Only text and image are supported")


def count_image_parts(messages: Sequence[Message]) -> int:
    """Number of image parts of a conversation."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def split_at_placeholders(messages: Sequence[Message]) -> list[Message]:
    """Copy a conversation. If it has no image parts, every `<image>` in its texts becomes one."""
    split = (lambda parts: list(parts)) if count_image_parts(messages) else _split_at_placeholders
    return [{**message, "content": split(message["content"])} for message in messages]


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
    messages = split_at_placeholders(messages)
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
        has_placeholder = part["type"] == "text" and "<image>" in part["text"]
        pieces = PLACEHOLDER.split(part["text"]) if has_placeholder else []
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
    return response_message(as_messages(content, "assistant"), prompt)


def response_message(messages: list[Message], prompt: Sequence[Message]) -> list[Message]:
    """Return the one message of the assistant, see `response_of`, from messages that are converted already."""
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


def parse_tools(tools: Any) -> list[Any] | None:
    """Return a row's JSON schemas of tools, without the nulls that a table adds to them. None for none.

    Args:
        tools: a list, or its JSON text.

    Raises:
        ValueError: if the text is not JSON.
    """
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise ValueError(f"tools is not JSON: {error}") from error
    return _without_nulls(tools) or None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
