"""Converters for general formats: LLaMA-Factory, TRL, chats, and custom tables of images or responses."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from dpo_mm.data.conversation import Message, parse_tools, place_images, response_message
from dpo_mm.data.response_columns import MEDIA_COLUMNS
from dpo_mm.data.row_sides import has_one_image, one_image_sides, one_response
from dpo_mm.data.schema import PREFERENCES, image_preference, response_preference
from dpo_mm.errors import RowError
from dpo_mm.sources.fine_tuning_sets import last_response, liked_of
from dpo_mm.sources.messages import to_messages
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row
from dpo_mm.sources.raw_rows import ORIGIN
from dpo_mm.sources.response_pair_sets import IMAGE_COUNT_MISMATCH, response_pair


def llama_factory(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert LLaMA-Factory's ranking format.

    Columns: `conversations` (or `messages`), `chosen`, `rejected` (ShareGPT or OpenAI turns), `images`, `system`. Or Alpaca's
    `instruction`, `input`, `history`, with texts as `chosen` and `rejected`.
    """
    for row in rows:
        if "instruction" in row:
            prompt = _alpaca_prompt(row)
            yield conversation_pair(row, prompt, *(_turns(row[side], "assistant") for side in ("chosen", "rejected")))
            continue
        prompt = row["conversations"] if "conversations" in row else row["messages"]
        yield conversation_pair(row, prompt, *(_turns(row[side], "assistant") for side in ("chosen", "rejected")))


def _alpaca_prompt(row: Row) -> list[Any]:
    """Earlier turns, and the instruction with its input on the next line."""
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    earlier = [
        {"role": role, "content": text}
        for turn in row.get("history") or []
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*earlier, {"role": "user", "content": question}]


def trl(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert TRL's preference format: `prompt, chosen, rejected` as texts or messages, `images` (or `image`), `tools`, `system`.

    Without a prompt, the messages that chosen and rejected have in common at their beginning are the prompt. Rows of
    `prompt, completion` are chosen, or liked and disliked by `label`.
    """
    for row in rows:
        if source := one_response(_columns(row)):
            sides = _liked_side(
                _turns(row[source], "assistant"), liked=source == "chosen" or liked_of(row) is not False
            )
            yield conversation_pair(row, _turns(row["prompt"], "user"), *sides)
            continue
        chosen, rejected = (_turns(row[side], "assistant") for side in ("chosen", "rejected"))
        prompt = _turns(row["prompt"], "user") if row.get("prompt") else []
        if not prompt:
            end = next((n for n, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y), 0)
            prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
        yield conversation_pair(row, prompt, chosen, rejected)


def chat(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert chats: `messages` (or `conversations`), `images` or images inside the messages, `tools`, `system`.

    The last turn of the assistant is the chosen response, or a disliked one if `liked`, `label` or `kto_tag` is false.
    """
    for row in rows:
        split = last_response(row["messages"] if "messages" in row else row["conversations"])
        if split is None:
            yield LeftOut("it has no response of the assistant")
            continue
        yield conversation_pair(row, split[0], *_liked_side(split[1], liked=liked_of(row) is not False))


def _columns(row: Row) -> list[str]:
    return [name for name in row if not name.startswith("_")]


def _liked_side(response: Any, *, liked: bool) -> tuple[Any, Any]:
    """Return the only response of a row as chosen or as rejected."""
    return (response, None) if liked else (None, response)


def _turns(content: Any, role: str) -> list[Any]:
    if isinstance(content, str | dict):
        return [{"role": role, "content": content}] if isinstance(content, str) else [content]
    return list(content)


def conversation_pair(row: Row, prompt: list[Any], chosen: Any, rejected: Any) -> Item:
    """Build a `ResponsePreference` row from turns, or the reason to leave the row out.

    Args:
        row: raw row, with its images, tools and system prompt.
        prompt: turns before the response.
        chosen, rejected: turns of the responses. None: the row has no such side.
    """
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    images = [images] if isinstance(images, str) else list(images)
    if not prompt:
        return LeftOut("its chosen and rejected conversations have no prompt in common")
    if any(row.get(name) for name in MEDIA_COLUMNS):
        return LeftOut("it has a video or audio. Only text and image are supported")
    if row.get("system") and prompt[0].get("role", prompt[0].get("from")) != "system":
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    inside: list[Any] = []
    try:
        messages = to_messages(prompt, None if images else inside)
        tools = parse_tools(row.get("tools"))
        sides = {"chosen": chosen, "rejected": rejected}
        responses = {side: _response(turns, messages) for side, turns in sides.items() if turns is not None}
    except ValueError as error:
        return LeftOut(str(error))
    images = images or inside
    prompt_with_images = place_images(messages, len(images))
    if prompt_with_images is None:
        return IMAGE_COUNT_MISMATCH
    return {
        "id": str(row.get("id") or row["_number"]),
        "images": images,
        "prompt": prompt_with_images,
        **responses,
        **({"tools": json.dumps(tools)} if tools else {}),
        **_typed_columns(row, ("score_gap", "probability", "axis", "license", "reason", "model")),
    }


def _response(turns: Any, prompt: list[Message]) -> list[Message]:
    return response_message(to_messages(turns, []), prompt)


def custom_images(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert a custom table of image pairs.

    Columns: `prompt` (a text or a list of captions), `image_a, image_b` (paths relative to the table), `preference` (a | b | tie | both_bad), and any other
    column of `ImagePreference`. `image_source` is a path or a list of paths. Or one image per row: `prompt, image`, and `liked` if there are disliked ones.

    Raises:
        ValueError: if a preference is unknown or a number is not valid. The error names the row.
    """
    known = _other_columns("images")
    for row in rows:
        captions = {"prompt": row["prompt"]} if isinstance(row.get("prompt"), list) else {}
        others = {**_typed_columns({**row, **dict.fromkeys(captions)}, known), **captions}
        others |= {"image_source": row["image_source"]} if row.get("image_source") else {}
        if has_one_image(_columns(row)):
            sides = one_image_sides(row["image"], liked=liked_of(row, ("liked",)) is not False)
            yield {"id": str(row.get("id") or row["_number"]), **sides, **others}
            continue
        if row["preference"] not in PREFERENCES:
            raise RowError(
                f"{row[ORIGIN]}: preference is {row['preference']!r}. Expected one of {', '.join(PREFERENCES)}"
            )
        name = str(row.get("id") or row["_number"])
        yield {"id": name, "image_a": row["image_a"], "image_b": row["image_b"], **others}


def custom_responses(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert a custom table of response pairs.

    Columns: `prompt, chosen, rejected`, `image` (a path relative to the table) or `images`, and any other column of
    `ResponsePreference`. Or one response per row: `prompt, completion`, and `liked` or `label` if there are disliked ones.

    Raises:
        ValueError: if a number is not valid. The error names the row.
    """
    known = _other_columns("responses")
    for row in rows:
        images = row.get("images") or ([row["image"]] if row.get("image") else [])
        images = [images] if isinstance(images, str) else list(images)
        source = one_response(_columns(row))
        chosen, rejected = (row[source], row[source]) if source else (row["chosen"], row["rejected"])
        item = response_pair(row, row["prompt"], chosen, rejected, images, **_typed_columns(row, known))
        if source and isinstance(item, dict):
            item[_other_side(liked=source == "chosen" or liked_of(row) is not False)] = None
        yield {**item, "id": str(row.get("id") or row["_number"])} if isinstance(item, dict) else item


def _other_side(*, liked: bool) -> str:
    return "rejected" if liked else "chosen"


@functools.cache
def _other_columns(kind: str) -> tuple[str, ...]:
    """Columns of a pair of images or responses besides its id, its images and its conversation."""
    features = image_preference() if kind == "images" else response_preference()
    converted = (
        {"id", "image_a", "image_b", "image_source"}
        if kind == "images"
        else {"id", "images", "prompt", "chosen", "rejected"}
    )
    return tuple(name for name in features if name not in converted)


@functools.cache
def _column_kinds() -> dict[str, str]:
    """Data type of each column of a pair, by name."""
    features = {**response_preference(), **image_preference()}
    return {name: str(getattr(feature, "dtype", "string")) for name, feature in features.items()}


def _typed_columns(row: Row, columns: tuple[str, ...]) -> Row:
    """Columns that the row fills, with their type. In a CSV file every value is a text."""
    kinds = _column_kinds()
    typed: dict[str, Any] = {}
    for name in columns:
        value = row.get(name)
        if value is None or value == "":
            continue
        kind = kinds[name]
        try:
            typed[name] = {"float64": float, "int64": int, "bool": _parse_bool}.get(kind, _parse_text)(value)  # type: ignore[operator]
            if kind == "float64" and not math.isfinite(typed[name]):
                raise ValueError(value)
            if kind == "int64" and abs(typed[name]) >= 2**63:
                raise ValueError(value)
        except (TypeError, ValueError, OverflowError):
            expected = {"float64": "a number that is finite", "int64": "a whole number of at most 64 bits"}.get(
                kind, "a text"
            )
            raise RowError(f"{row[ORIGIN]}: {name} is {value!r:.80}. Expected {expected}") from None
    return typed


def _parse_text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise TypeError(value)
    return str(value)


def _parse_bool(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes")
