"""Sets of answers to questions about images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from dpo_mm.sources.messages import asked, placed, said, turns
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row

MISMATCH = LeftOut("its images and their places in the question don't match")


def answer_pair(row: Row, question: str, chosen: str, rejected: str, images: list[Any], **more: Any) -> Item:
    """A canonical row of one question and two answers, or why there is none."""
    prompt = asked(question, len(images))
    if prompt is None:
        return MISMATCH
    return {
        "id": str(row["_number"]),
        "images": images,
        "prompt": prompt,
        "chosen": said(chosen),
        "rejected": said(rejected),
        **more,
    }


def rlhf_v(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`image, text`, where text is a JSON string of question, chosen and rejected."""
    for row in rows:
        try:
            text = json.loads(row["text"])
            question, chosen, rejected = (text[name] for name in ("question", "chosen", "rejected"))
        except (ValueError, TypeError, KeyError):
            if "text" not in row:
                raise
            yield LeftOut("its text is no JSON of question, chosen and rejected")
            continue
        yield answer_pair(row, question, chosen, rejected, [row["image"]], axis="faithfulness")


def rlaif_v(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`image, question, chosen, rejected`, and where they come from."""
    for row in rows:
        yield answer_pair(row, row["question"], row["chosen"], row["rejected"], [row["image"]], axis="faithfulness")


def mmpr(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`image` (a path, a list of them, or none), `question` with `<image>` for each, `chosen, rejected`."""
    for row in rows:
        image = row.get("image") or []
        images = [image] if isinstance(image, str) else list(image)
        yield answer_pair(row, row["question"], row["chosen"], row["rejected"], images, axis="overall")


ASPECTS = {
    "helpfulness": "Helpfulness",
    "faithfulness": "Visual Faithfulness",
    "ethics": "Ethical Considerations",
}


def vl_feedback(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`id, prompt, completions{annotations{3 aspects{Rating, Rationale}}, model, response}`, `img_path` (or `image`).

    Ratings are strings, 1 to 5 or N/A. Every two answers that are rated apart are a pair, with the gap as its margin;
    overall is the mean of the three aspects (Li et al. 2023, 2312.10665).
    """
    for row in rows:
        image = row.get("image") or row["img_path"]
        rated = [(one, _rating(one["annotations"], axis)) for one in _as_list(row["completions"])]
        for (a, (one, x)), (b, (other, y)) in combinations(enumerate(rated), 2):
            if x is None or y is None:
                yield LeftOut("an answer has no rating")
            elif x == y:
                yield LeftOut("its answers are rated alike")
            else:
                best, worst = (one, other) if x > y else (other, one)
                more = {"score_gap": abs(x - y), "axis": axis or "overall", "group_id": str(row["id"])}
                more |= {"chosen_model": best["model"], "rejected_model": worst["model"]}
                item = answer_pair(row, row["prompt"], best["response"], worst["response"], [image], **more)
                yield {**item, "id": f"{row['_number']}-{a}-{b}"} if isinstance(item, dict) else item


def _as_list(completions: Any) -> list[Row]:
    """Completions as a list of structs, also from the struct of lists that older versions of `datasets` wrote."""
    if isinstance(completions, list):
        return completions
    count = len(completions["response"])
    notes = completions["annotations"]
    return [
        {
            "model": completions["model"][n],
            "response": completions["response"][n],
            "annotations": notes[n] if isinstance(notes, list) else _nth(notes, n),
        }
        for n in range(count)
    ]


def _nth(notes: dict[str, Any], n: int) -> Row:
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
    """`image, conversations, rejected_conversations`: the same turns but for the last one."""
    for row in rows:
        chosen, rejected = turns(row["conversations"]), turns(row["rejected_conversations"])
        if chosen[:-1] != rejected[:-1]:
            yield LeftOut("its two prompts differ")
            continue
        images = [row["image"]] if row.get("image") else []
        prompt = placed(chosen[:-1], len(images))
        if prompt is None:
            yield MISMATCH
            continue
        answers = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
        yield {"id": str(row["_number"]), "images": images, "prompt": prompt, **answers, "axis": "faithfulness"}
