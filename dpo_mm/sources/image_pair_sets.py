"""Sets of image pairs: a row is a pair, and says which side won."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from dpo_mm.sources.parquet_writer import Item, LeftOut, Row


def group_of(prompt: str) -> str:
    """A name for all pairs of one prompt."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def pickapic(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`caption, jpg_0, jpg_1` (bytes), `label_0, label_1` (1, 0, or 0.5 for a tie), `has_label, are_different`, models."""
    winners = {(1.0, 0.0): "a", (0.0, 1.0): "b", (0.5, 0.5): "tie"}
    for row in rows:
        preference = winners.get((float(row["label_0"] or 0), float(row["label_1"] or 0)))
        if not row.get("has_label", True) or preference is None:
            yield LeftOut("it has no label")
        elif not row.get("are_different", True):
            yield LeftOut("its two pictures are the same")
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
    """`prompt, chosen, rejected` (pictures), `chosen_model, rejected_model`."""
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
    """`images{image_1, image_2}` (addresses), `prompt, model_1, model_2, preference.responses[]` with their status.

    Of an address only the end is used: the picture of that folder and name in your copy of open-image-preferences-v1.
    """
    for row in rows:
        answers = row["preference.responses"] or []
        states = row.get("preference.responses.status") or ["submitted"] * len(answers)
        votes = Counter(answer for answer, state in zip(answers, states, strict=True) if state == "submitted")
        if not votes:
            yield LeftOut("it has no votes")
            continue
        a, b, both = votes["image_1"], votes["image_2"], votes["both_good"] + votes["both_bad"]
        yield {
            "id": str(row["_number"]),
            "prompt": row["prompt"] if isinstance(row["prompt"], str) else row["images"]["prompt"],
            "image_a": _tail(row["images"]["image_1"]),
            "image_b": _tail(row["images"]["image_2"]),
            "preference": _plurality(votes),
            "p_a": (a + both / 2) / (a + b + both),
            "votes_a": a,
            "votes_b": b,
            "axis": "overall",
            "model_a": row.get("model_1"),
            "model_b": row.get("model_2"),
        }


def _tail(address: str) -> str:
    return "/".join(PurePosixPath(address).parts[-2:])


def _plurality(votes: Counter[str]) -> str:
    """The side with more votes; where they are equal, or outnumbered by votes for neither, a tie or both bad."""
    a, b = votes["image_1"], votes["image_2"]
    neither = votes["both_good"] + votes["both_bad"]
    if a != b and max(a, b) > neither:
        return "a" if a > b else "b"
    return "both_bad" if votes["both_bad"] > max(votes["both_good"], a, b) else "tie"


def rapidata(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`prompt, image1, image2, votes_image1, votes_image2, model1, model2`; p_a = v1 / (v1 + v2)."""
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
    """`prompt, path1, path2` (path1 is preferred), `choice_dist`, `model1, model2`; `confidence` has no public meaning.

    choice_dist: votes of both sides where they are whole numbers, shares where they add up to 1.
    """
    for row in rows:
        shares = [float(value) for value in row.get("choice_dist") or ()]
        counted = len(shares) == 2 and sum(shares) > 0
        whole = counted and all(value.is_integer() for value in shares) and sum(shares) > 1
        yield {
            "id": str(row["_number"]),
            "prompt": row["prompt"],
            "image_a": row["path1"],
            "image_b": row["path2"],
            "preference": "a",
            "p_a": shares[0] / sum(shares) if counted else None,
            "votes_a": int(shares[0]) if whole else None,
            "votes_b": int(shares[1]) if whole else None,
            "axis": "overall",
            "model_a": row.get("model1"),
            "model_b": row.get("model2"),
            "group_id": group_of(row["prompt"]),
        }


AXES_BY_FILE = {"aes": "aesthetic", "tf": "faithfulness"}


def hpdv3_plusplus(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """`prompt, path1, path2` (path1 is preferred) in train_aes.json and train_tf.json: the file is the axis."""
    for row in rows:
        found = AXES_BY_FILE.get(row["_file"].removesuffix(".json").rpartition("_")[2])
        if found is None or axis not in (None, found):
            raise ValueError(f"{row['_file']}: expected a file called ..._aes.json or ..._tf.json, which says the axis")
        yield from ({**item, "axis": found} if isinstance(item, dict) else item for item in hpdv3([row], axis))
