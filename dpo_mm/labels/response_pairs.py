"""Pairs of responses to label: a is the response of the column chosen, and b that of the column rejected.

An earlier label of a row is not shown and does not count. An export writes the winner of the votes as chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_mm.data.conversation import Message, as_messages, response_of
from dpo_mm.data.image_files import image_bytes
from dpo_mm.data.schema import load_responses, prompt_images, response_preference
from dpo_mm.doctor.response_checks import text_of

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("", "_truncated", "_model")
"""Ends of the names of columns that a row has for chosen and for rejected."""
EARLIER_LABEL = ("probability", "score_gap", "reason")
"""Columns of a label that the votes replace."""


@dataclass(frozen=True)
class ResponseTexts:
    """Texts of a row.

    Args:
        prompt: the prompt. Turns of a longer conversation begin with their role.
        a, b: the responses.
    """

    prompt: str
    a: str
    b: str


def open_response_pairs(path: str, dataset_name: str) -> Dataset:
    """Open response preference rows with undecoded images.

    Raises:
        ValueError: if a row has one response, or as in `load_responses`.
    """
    from datasets import Image, List

    rows = load_responses(path, dataset_name=dataset_name)
    for column in ("chosen", "rejected"):
        missing = rows.data.column(column).is_null().to_pylist()
        if True in missing:
            raise ValueError(
                f"{dataset_name}, row {missing.index(True)}: has no {column} response. Labels compare two responses per row"
            )
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(column, List(Image(decode=False)))
    return rows


def is_response(row: Mapping[str, Any]) -> bool:
    """Return True for a row of responses, False for one of images."""
    return "chosen" in row


def response_texts(row: Mapping[str, Any]) -> ResponseTexts:
    """Return the texts of a row.

    Raises:
        ValueError: if the prompt or a response is not valid.
    """
    prompt, a, b = _messages(row)
    turns = [(message["role"], text_of([message])) for message in prompt]
    shown = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)
    return ResponseTexts(shown, text_of(a), text_of(b))


def _messages(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the messages of the prompt, of a and of b."""
    prompt = as_messages(row["prompt"], "user")
    return prompt, response_of(row["chosen"], prompt), response_of(row["rejected"], prompt)


def response_digest(row: Mapping[str, Any]) -> str:
    """Return a hash of the prompt, its images and both responses. An image that cannot be read counts as empty."""
    texts = json.dumps([row["prompt"], row["chosen"], row["rejected"]], sort_keys=True, ensure_ascii=False)
    parts = [texts.encode("utf-8", "surrogatepass")]
    for cell in prompt_images(row):
        try:
            parts.append(image_bytes(cell))
        except (OSError, ValueError):
            parts.append(b"")
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def labelled_response(row: Mapping[str, Any], preference: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row of `response_preference` whose chosen response won the votes. None if neither won.

    Args:
        row: a row of `open_response_pairs`.
        preference: its preference and p_a, as `tally` returns them.

    Raises:
        ValueError: if the prompt, a response or an image is not valid.
        OSError: if the file of an image no longer exists.
    """
    winner = preference["preference"]
    if winner not in ("a", "b"):
        return None
    prompt, a, b = _messages(row)
    known = {name: row.get(name) for name in response_preference() if name not in EARLIER_LABEL}
    pair = {**known, "prompt": prompt, "chosen": a, "rejected": b}
    if winner == "b":
        names = [(f"chosen{end}", f"rejected{end}") for end in SIDES]
        pair |= {one: pair[other] for names_of in names for one, other in (names_of, names_of[::-1])}
    images = [{"bytes": image_bytes(cell), "path": None} for cell in prompt_images(row)]
    p_a = float(preference["p_a"])
    return {**pair, "images": images, "probability": p_a if winner == "a" else 1 - p_a}
