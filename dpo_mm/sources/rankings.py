"""Converters for datasets that rank or rate several images of a prompt.

Every two of them form a pair. Equal ones are a tie.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any

from dpo_mm.files.resumable import explain_unwritten
from dpo_mm.sources.image_pair_sets import group_of
from dpo_mm.sources.parquet_writer import Item, LeftOut, Row
from dpo_mm.sources.raw_rows import ORIGIN, name_raw_row


def hpdv2(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert HPDv2.

    train.json has `prompt, file_path[], human_preference[]` (1 is preferred). test.json has `prompt, image_path[], rank[],
    raw_annotations[{rank, user_hash}]` (a smaller rank is better, and numbers may be skipped or shared).
    """
    for row in rows:
        ranked = "rank" in row
        files = row["image_path"] if ranked else row["file_path"]
        order = row["rank"] if ranked else [-value for value in row["human_preference"]]
        if len(files) != len(order) or len(files) < 2:
            yield LeftOut("its images and ranks do not match")
            continue
        notes = row.get("raw_annotations") or []
        ranks = [note["rank"] for note in notes if len(note["rank"]) == len(files)]
        for a, b in combinations(range(len(files)), 2):
            votes = [sum(rank[x] < rank[y] for rank in ranks) if ranks else None for x, y in ((a, b), (b, a))]
            yield {
                "id": f"{row['_number']}-{a}-{b}",
                "prompt": row["prompt"],
                "image_a": files[a],
                "image_b": files[b],
                "preference": _preference(order[a], order[b]),
                "votes_a": votes[0],
                "votes_b": votes[1],
                "axis": "overall",
                "group_id": group_of(row["prompt"]),
            }


def _preference(a: float, b: float) -> str:
    """Return the side with the smaller number, or a tie."""
    return "tie" if a == b else "a" if a < b else "b"


RATINGS = {
    "overall": "overall_rating",
    "faithfulness": "image_text_alignment_rating",
    "fidelity": "fidelity_rating",
}
"""Column of ImageRewardDB's rating for each axis."""


def image_reward_db(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert ImageRewardDB: `image_path` (or `image`), `prompt_id, prompt, rank` and ratings from 1 to 7.

    A smaller rank and a higher rating are better. The overall axis uses the rank, the others their rating. Scores are
    the ratings.
    """
    for group in group_rows(rows, lambda row: row["prompt_id"]):
        for a, b in combinations(group, 2):
            with name_raw_row(a):
                item = _image_reward_pair(a, b, axis or "overall")
            yield item


def _image_reward_pair(a: Row, b: Row, axis: str) -> Item:
    rating = RATINGS[axis]
    if axis == "overall":
        preference = _preference(a["rank"], b["rank"])
    elif a[rating] is None or b[rating] is None:
        return LeftOut(f"it has no {rating}")
    else:
        preference = _preference(-a[rating], -b[rating])
    return _pair(a, b, preference, axis, a.get(rating), b.get(rating), group=str(a["prompt_id"]))


def _pair(a: Row, b: Row, preference: str, axis: str, score_a: Any, score_b: Any, *, group: str) -> Row:
    return {
        "id": f"{a['_number']}-{b['_number']}",
        ORIGIN: a[ORIGIN],
        "prompt": a["prompt"],
        "image_a": a.get("image") or a["image_path"],
        "image_b": b.get("image") or b["image_path"],
        "preference": preference,
        "score_a": score_a,
        "score_b": score_b,
        "axis": axis,
        "group_id": group,
    }


ASPECTS = {
    "symmetry": (-1, 1),
    "richness": (-2, 2),
    "color aesthetic": (-1, 1),
    "detail realism": (-3, 1),
    "safety": (-3, 1),
    "body": (-4, 1),
    "lighting aesthetic": (-1, 2),
    "lighting distinction": (-1, 2),
    "background": (-1, 2),
    "emotion": (-2, 2),
    "main object": (-1, 1),
    "color brightness": (-1, 1),
    "face": (-3, 2),
    "hands": (-4, 1),
    "clarity": (-2, 2),
    "detail refinement": (-4, 2),
    "object pairing": (-1, 1),
}
"""Aspects of VisionRewardDB with their ranges, from its card. The 18th, "unsafe type", is a category and not a score."""


def vision_reward_db(rows: Iterable[Row], axis: str | None) -> Iterator[Item]:
    """Convert VisionRewardDB, which has one image per row.

    Columns: `image, prompt, annotation{18 integers}, meta_result[], meta_mask[]`.
    Pairs are formed within a prompt. Scores are in [0, 1]. The overall score is the fraction of the checklist's
    applicable questions (`meta_mask`) with the answer yes. Without a checklist it is the mean of the aspects, each over
    its range. Every aspect can be the axis.
    """
    axis = axis or "overall"
    for group in group_rows(rows, lambda row: row["prompt"]):
        scored = []
        for row in group:
            with name_raw_row(row):
                scored.append((row, _vision_reward_score(row, axis), group_of(row["prompt"])))
        for (a, score_a, prompt_hash), (b, score_b, _) in combinations(scored, 2):
            if score_a is None or score_b is None:
                yield LeftOut(f"it has no annotation of {axis}")
            else:
                preference = _preference(-score_a, -score_b)
                with name_raw_row(a):
                    pair = _pair(a, b, preference, axis, score_a, score_b, group=prompt_hash)
                yield pair


def _vision_reward_score(row: Row, axis: str) -> float | None:
    notes = row["annotation"] or {}
    scores = {
        name: (notes[name] - low) / (high - low) for name, (low, high) in ASPECTS.items() if notes.get(name) is not None
    }
    if axis != "overall":
        return scores.get(axis)
    results, mask = row.get("meta_result"), row.get("meta_mask")
    if results and mask and len(results) == len(mask) and any(mask):
        return sum(result > 0 for result, applies in zip(results, mask, strict=True) if applies) / sum(map(bool, mask))
    return sum(scores.values()) / len(scores) if scores else None


def group_rows(rows: Iterable[Row], key: Callable[[Row], str]) -> Iterator[list[Row]]:
    """Group rows by their key, in the order of each key's first row. A group's rows need not be consecutive.

    Images that are bytes are stored in a temporary file, so only the other columns are in memory.
    """
    groups: dict[str, list[Row]] = {}
    with tempfile.TemporaryFile(prefix="dpo-mm-") as store:
        for row in rows:
            cell = row.get("image")
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if isinstance(data, bytes):
                row = {**row, "image": (store.tell(), len(data))}
                with explain_unwritten(tempfile.gettempdir(), fix="Free space, or set TMPDIR to another folder"):
                    store.write(data)
            with name_raw_row(row):
                groups.setdefault(str(key(row)), []).append(row)
        for group in groups.values():
            yield [_restore_image(row, store) for row in group]


def _restore_image(row: Row, store: Any) -> Row:
    if not isinstance(row.get("image"), tuple):
        return row
    offset, size = row["image"]
    store.seek(offset)
    return {**row, "image": store.read(size)}
