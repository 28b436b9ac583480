"""Converters for datasets of pairs of responses to questions about images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from dpo_mm.data.conversation import place_images
from dpo_mm.sources.messages import assistant_message, to_messages, user_message
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row

IMAGE_COUNT_MISMATCH = LeftOut("its images do not match the image placeholders in the question")


def response_pair(row: Row, question: str, chosen: str, rejected: str, images: list[Any], **more: Any) -> Item:
    """Build a `ResponsePreference` row from a question and two responses, or the reason to leave the row out.

    Args:
        row: raw row.
        question: text with one `<image>` per image, or none.
        chosen, rejected: texts of the responses.
        images: images of the question, as cells of the raw row.
        more: further columns of the row.
    """
    prompt = user_message(question, len(images))
    if prompt is None:
        return IMAGE_COUNT_MISMATCH
    return {
        "id": str(row["_number"]),
        "images": images,
        "prompt": prompt,
        "chosen": assistant_message(chosen),
        "rejected": assistant_message(rejected),
        **more,
    }


def rlhf_v(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert RLHF-V: `image, text`. The text is a JSON string of question, chosen and rejected."""
    for row in rows:
        try:
            text = json.loads(row["text"])
            question, chosen, rejected = (text[name] for name in ("question", "chosen", "rejected"))
        except (ValueError, TypeError, KeyError):
            if "text" not in row:
                raise
            yield LeftOut("its text is not JSON of question, chosen and rejected")
            continue
        yield response_pair(row, question, chosen, rejected, [row["image"]], axis="faithfulness")


def rlaif_v(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert RLAIF-V: `image, question, chosen, rejected`, and columns about their origin, which are not used."""
    for row in rows:
        yield response_pair(row, row["question"], row["chosen"], row["rejected"], [row["image"]], axis="faithfulness")


def mmpr(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert MMPR: `image` (a path, a list of paths, or none), `question` with `<image>`s, `chosen, rejected`."""
    for row in rows:
        image = row.get("image") or []
        images = [image] if isinstance(image, str) else list(image)
        yield response_pair(row, row["question"], row["chosen"], row["rejected"], images, axis="overall")


ASPECTS = {
    "helpfulness": "Helpfulness",
    "faithfulness": "Visual Faithfulness",
    "ethics": "Ethical Considerations",
}
"""Name of VLFeedback's rating for each axis."""


def vl_feedback(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert VLFeedback.

    Columns: `id, prompt, completions{annotations{3 aspects{Rating, Rationale}}, model, response}`, `img_path` (or `image`).
    Ratings are texts, 1 to 5 or N/A. Every two responses with different ratings form a pair, with the difference as
    `score_gap`. The overall rating is the mean of the three aspects.

    Source: Li et al. 2023 (2312.10665).
    """
    for row in rows:
        image = row.get("image") or row["img_path"]
        completions = _as_list(row["completions"])
        rated = [(completion, _rating(completion["annotations"], axis)) for completion in completions]
        for (a, (first, x)), (b, (second, y)) in combinations(enumerate(rated), 2):
            if x is None or y is None:
                yield LeftOut("a response has no rating")
            elif x == y:
                yield LeftOut("its responses have the same rating")
            else:
                best, worst = (first, second) if x > y else (second, first)
                columns = {"score_gap": abs(x - y), "axis": axis or "overall", "group_id": str(row["id"])}
                columns |= {"chosen_model": best["model"], "rejected_model": worst["model"]}
                item = response_pair(row, row["prompt"], best["response"], worst["response"], [image], **columns)
                yield {**item, "id": f"{row['_number']}-{a}-{b}"} if isinstance(item, dict) else item


def _as_list(completions: Any) -> list[Row]:
    """Completions as a list of structs. Older versions of `datasets` wrote a struct of lists."""
    if isinstance(completions, list):
        return completions
    count = len(completions["response"])
    notes = completions["annotations"]
    return [
        {
            "model": completions["model"][n],
            "response": completions["response"][n],
            "annotations": notes[n] if isinstance(notes, list) else _completion_notes(notes, n),
        }
        for n in range(count)
    ]


def _completion_notes(notes: dict[str, Any], n: int) -> Row:
    return {aspect: {"Rating": ratings["Rating"][n]} for aspect, ratings in notes.items()}


def _rating(notes: Row, axis: str | None) -> float | None:
    names = [ASPECTS[axis]] if axis in ASPECTS else list(ASPECTS.values())
    values = [_number((notes.get(name) or {}).get("Rating")) for name in names]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(rating: Any) -> float | None:
    try:
        return float(rating)
    except (TypeError, ValueError):
        return None


def povid(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert POVID: `image, conversations, rejected_conversations`. Only the last turn differs."""
    for row in rows:
        chosen, rejected = to_messages(row["conversations"]), to_messages(row["rejected_conversations"])
        if chosen[:-1] != rejected[:-1]:
            yield LeftOut("its two prompts differ")
            continue
        images = [row["image"]] if row.get("image") else []
        prompt = place_images(chosen[:-1], len(images))
        if prompt is None:
            yield IMAGE_COUNT_MISMATCH
            continue
        responses = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
        yield {"id": str(row["_number"]), "images": images, "prompt": prompt, **responses, "axis": "faithfulness"}
