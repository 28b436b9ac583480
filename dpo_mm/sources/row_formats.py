"""Forms that any set may have: LLaMA-Factory's, TRL's, and your own table of pairs or of answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dpo_mm.data.schema import PREFERENCES, image_preference, response_preference
from dpo_mm.sources.messages import placed, turns
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row
from dpo_mm.sources.response_pair_sets import MISMATCH, answer_pair


def llama_factory(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`conversations, chosen, rejected` (ShareGPT or OpenAI turns), `images`, `system`: its form with ranking: true."""
    for row in rows:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        turns_before = turns([*system, *row["conversations"]])
        yield _conversation(row, turns_before, turns(row["chosen"]), turns(row["rejected"]))


def trl(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`prompt, chosen, rejected` as texts or messages, `images` (or `image`); without a prompt it is what both share."""
    for row in rows:
        chosen, rejected = (_messages(row[side], "assistant") for side in ("chosen", "rejected"))
        if row.get("prompt"):
            prompt = _messages(row["prompt"], "user")
        else:
            same = next((n for n, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y), 0)
            prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        yield _conversation(row, prompt, chosen, rejected)


def _messages(content: Any, role: str) -> list[dict[str, Any]]:
    return turns([{"role": role, "content": content}] if isinstance(content, str) else content)


def _conversation(row: Row, prompt: list[Any], chosen: list[Any], rejected: list[Any]) -> Item:
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    images = [images] if isinstance(images, str) else list(images)
    if not prompt:
        return LeftOut("its two sides share no prompt")
    if any(message["role"] != "assistant" for message in (*chosen, *rejected)):
        return LeftOut("its two prompts differ")
    found = placed(prompt, len(images))
    if found is None:
        return MISMATCH
    return {
        "id": str(row.get("id") or row["_number"]),
        "images": images,
        "prompt": found,
        "chosen": chosen,
        "rejected": rejected,
        **_told(row, ("score_gap", "probability", "axis", "license", "reason", "model")),
    }


def custom_images(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """A table with `prompt, image_a, image_b` (paths beside it), `preference` (a | b | tie | both_bad), and any other
    column of `ImagePreference`. Raises ValueError that names the row for another preference or a bad number.
    """
    known = tuple(name for name in image_preference() if name not in ("id", "image_a", "image_b"))
    for row in rows:
        if row["preference"] not in PREFERENCES:
            raise ValueError(
                f"{row['_file']}, row {row['_number']}: preference is {row['preference']!r}; "
                f"expected one of {', '.join(PREFERENCES)}"
            )
        name = str(row.get("id") or row["_number"])
        yield {"id": name, "image_a": row["image_a"], "image_b": row["image_b"], **_told(row, known)}


def custom_responses(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """A table with `prompt, chosen, rejected`, `image` (a path beside it) or `images`, and any other column of
    `ResponsePreference`. Raises ValueError that names the row for a bad number.
    """
    known = tuple(n for n in response_preference() if n not in ("id", "images", "prompt", "chosen", "rejected"))
    for row in rows:
        images = row.get("images") or ([row["image"]] if row.get("image") else [])
        images = [images] if isinstance(images, str) else list(images)
        item = answer_pair(row, row["prompt"], row["chosen"], row["rejected"], images, **_told(row, known))
        yield {**item, "id": str(row.get("id") or row["_number"])} if isinstance(item, dict) else item


def _told(row: Row, columns: tuple[str, ...]) -> Row:
    """Columns that a row fills, as their type; a CSV has text in all of them. Raises ValueError that names the row."""
    types = {**response_preference(), **image_preference()}
    found = {}
    for name in columns:
        value = row.get(name)
        if value is None or value == "":
            continue
        kind = str(getattr(types[name], "dtype", "string"))
        try:
            found[name] = {"float64": float, "int64": int, "bool": _flag}.get(kind, str)(value)  # type: ignore[operator]
        except ValueError:
            raise ValueError(f"{row['_file']}, row {row['_number']}: {name} is {value!r}; expected a number") from None
    return found


def _flag(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes")
