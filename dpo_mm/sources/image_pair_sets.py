"""Converters for datasets of image pairs, in which each row is a labelled pair."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from dpo_mm.sources.parquet_writer import Item, LeftOut, Row


def group_of(prompt: str) -> str:
    """Return a name for all pairs of one prompt, a hash of the prompt."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def pickapic(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert Pick-a-Pic: `caption, jpg_0, jpg_1` (bytes), `label_0, label_1` (1, 0, or 0.5 for a tie), models.

    Rows without a label (`has_label`) or with equal images (`are_different`) are left out.
    """
    winners = {(1.0, 0.0): "a", (0.0, 1.0): "b", (0.5, 0.5): "tie"}
    for row in rows:
        preference = winners.get((float(row["label_0"] or 0), float(row["label_1"] or 0)))
        if not row.get("has_label", True) or preference is None:
            yield LeftOut("it has no label")
        elif not row.get("are_different", True):
            yield LeftOut("its two images are the same")
        else:
            votes = {"a": (1, 0), "b": (0, 1), "tie": (None, None)}[preference]
            yield {
                "id": str(row["_number"]),
                "prompt": row["caption"],
                "image_a": row["jpg_0"],
                "image_b": row["jpg_1"],
                "preference": preference,
                "votes_a": votes[0],
                "votes_b": votes[1],
                "axis": "overall",
                "model_a": row.get("model_0"),
                "model_b": row.get("model_1"),
                "group_id": group_of(row["caption"]),
            }


def open_image_binarized(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert open-image-preferences: `prompt, chosen, rejected` (images), `chosen_model, rejected_model`."""
    for row in rows:
        yield {
            "id": str(row["_number"]),
            "prompt": row["prompt"],
            "image_a": row["chosen"],
            "image_b": row["rejected"],
            "preference": "a",
            "axis": "overall",
            "model_a": row.get("chosen_model"),
            "model_b": row.get("rejected_model"),
            "group_id": group_of(row["prompt"]),
        }


def open_image_results(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert the votes of open-image-preferences.

    Columns: `images{image_1, image_2}` (URLs), `prompt, model_1, model_2`, `preference.responses[]` with their status.
    Only the last folder and the name of a URL are used, to find the image in your copy of open-image-preferences-v1.
    """
    for row in rows:
        responses = row["preference.responses"] or []
        states = row.get("preference.responses.status") or ["submitted"] * len(responses)
        votes = Counter(vote for vote, state in zip(responses, states, strict=True) if state == "submitted")
        if not votes:
            yield LeftOut("it has no votes")
            continue
        a, b, both = votes["image_1"], votes["image_2"], votes["both_good"] + votes["both_bad"]
        yield {
            "id": str(row["_number"]),
            "prompt": row["prompt"] if isinstance(row["prompt"], str) else row["images"]["prompt"],
            "image_a": _last_two_parts(row["images"]["image_1"]),
            "image_b": _last_two_parts(row["images"]["image_2"]),
            "preference": _plurality(votes),
            "p_a": (a + both / 2) / (a + b + both),
            "votes_a": a,
            "votes_b": b,
            "axis": "overall",
            "model_a": row.get("model_1"),
            "model_b": row.get("model_2"),
        }


def _last_two_parts(url: str) -> str:
    return "/".join(PurePosixPath(url).parts[-2:])


def _plurality(votes: Counter[str]) -> str:
    """Return the image with more votes, or tie or both_bad if neither has more than the other votes."""
    a, b = votes["image_1"], votes["image_2"]
    neither = votes["both_good"] + votes["both_bad"]
    if a != b and max(a, b) > neither:
        return "a" if a > b else "b"
    return "both_bad" if votes["both_bad"] > max(votes["both_good"], a, b) else "tie"


def rapidata(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert Rapidata: `prompt, image1, image2, votes_image1, votes_image2, model1, model2`.

    `p_a` is the fraction of votes for image1.
    """
    for row in rows:
        a, b = row["votes_image1"] or 0, row["votes_image2"] or 0
        if a + b == 0:
            yield LeftOut("it has no votes")
            continue
        yield {
            "id": str(row["_number"]),
            "prompt": row["prompt"],
            "image_a": row["image1"],
            "image_b": row["image2"],
            "preference": "tie" if a == b else "a" if a > b else "b",
            "p_a": a / (a + b),
            "votes_a": int(a),
            "votes_b": int(b),
            "axis": axis or "overall",
            "model_a": row.get("model1"),
            "model_b": row.get("model2"),
            "group_id": group_of(row["prompt"]),
        }


def hpdv3(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert HPDv3: `prompt, path1, path2` (path1 is preferred), `choice_dist`, `model1, model2`.

    `choice_dist` are the votes for both images if they are whole numbers, and fractions if they add up to 1. `confidence`
    has no published meaning and is not used.
    """
    for row in rows:
        choices = [float(value) for value in row.get("choice_dist") or ()]
        known = len(choices) == 2 and sum(choices) > 0
        are_votes = known and all(value.is_integer() for value in choices) and sum(choices) > 1
        yield {
            "id": str(row["_number"]),
            "prompt": row["prompt"],
            "image_a": row["path1"],
            "image_b": row["path2"],
            "preference": "a",
            "p_a": choices[0] / sum(choices) if known else None,
            "votes_a": int(choices[0]) if are_votes else None,
            "votes_b": int(choices[1]) if are_votes else None,
            "axis": "overall",
            "model_a": row.get("model1"),
            "model_b": row.get("model2"),
            "group_id": group_of(row["prompt"]),
        }


AXES_BY_FILE = {"aes": "aesthetic", "tf": "faithfulness"}
"""Axis by the last part of a file's name."""


def hpdv3_plusplus(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert HPDv3-PlusPlus: rows as in HPDv3, in train_aes.json and train_tf.json. The file gives the axis."""
    for row in rows:
        file_axis = AXES_BY_FILE.get(row["_file"].removesuffix(".json").rpartition("_")[2])
        if file_axis is None or axis not in (None, file_axis):
            raise ValueError(
                f"{row['_file']}: expected a file called ..._aes.json or ..._tf.json, because the name gives the axis"
            )
        yield from ({**item, "axis": file_axis} if isinstance(item, dict) else item for item in hpdv3([row], axis))
