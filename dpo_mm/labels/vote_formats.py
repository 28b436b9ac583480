"""Votes in the forms that other tools of labelling read: Label Studio's tasks and Argilla's records, as JSON.

Every vote is kept with who cast it, repeats and skips too where the form has a place for them. Pictures travel inside
the file, as PNG or whatever they were.
"""

from __future__ import annotations

import base64
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dpo_mm.labels.pairs import file_of
from dpo_mm.labels.store import Vote

if TYPE_CHECKING:
    from datasets import Dataset

PEOPLE = uuid.UUID("5b1d0b39-9a0e-5d0c-8f7b-6c1d6a8f2f11")
"""Namespace of the ids that Argilla wants of people; a name gives the same id always."""


def label_studio(votes: Sequence[Vote], rows: Dataset) -> list[dict[str, Any]]:
    """Tasks with annotations, for a labelling interface with `Choices name="preference" toName="prompt"`.

    Source: Label Studio's task format; sides are the set's own, a and b, whatever side they stood on.
    """
    return [
        {
            "data": {"id": row["id"], "prompt": row["prompt"], "image_a": uri(row["image_a"]), "image_b": uri(row["image_b"])},
            "annotations": [
                {
                    "completed_by": {"email": vote.labeller},
                    "created_at": datetime.fromtimestamp(vote.cast_at, UTC).isoformat(),
                    "lead_time": round(vote.seconds, 3),
                    "was_cancelled": vote.said == "skip",
                    "result": [] if vote.said == "skip" else [
                        {"from_name": "preference", "to_name": "prompt", "type": "choices", "value": {"choices": [vote.said]}}
                    ],
                }
                for vote in cast
            ],
        }
        for row, cast in _voted(votes, rows)
    ]  # fmt: skip


def argilla(votes: Sequence[Vote], rows: Dataset) -> list[dict[str, Any]]:
    """Records as `Dataset.records.from_json` reads them: fields, and a response `preference` of each person.

    A person has one response a record there, so repeats are left out, and skips.
    """
    return [
        {
            "id": row["id"],
            "fields": {"prompt": row["prompt"], "image_a": uri(row["image_a"]), "image_b": uri(row["image_b"])},
            "metadata": {name: row[name] for name in ("model_a", "model_b", "source", "license") if row[name]},
            "suggestions": {},
            "responses": {
                "preference": [
                    {"value": vote.said, "user_id": str(uuid.uuid5(PEOPLE, vote.labeller))}
                    for vote in cast
                    if not vote.again and vote.said != "skip"
                ]
            },
            "vectors": {},
        }
        for row, cast in _voted(votes, rows)
    ]


def uri(cell: dict[str, Any]) -> str:
    """An undecoded picture as a data URI, its bytes as they are."""
    data = file_of(cell)
    kinds = {
        b"\x89PNG": "png",
        b"\xff\xd8\xff": "jpeg",
        b"RIFF": "webp",
        b"BM": "bmp",
        b"II*\x00": "tiff",
        b"MM\x00*": "tiff",
    }
    kind = next((kind for start, kind in kinds.items() if data.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _voted(votes: Sequence[Vote], rows: Dataset) -> Iterable[tuple[dict[str, Any], list[Vote]]]:
    """Rows that have a vote, each with its votes, in the set's order."""
    cast: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        cast[vote.pair].append(vote)
    for row in rows:
        if row["id"] in cast:
            yield row, cast[row["id"]]


FORMS: dict[str, Callable[[Sequence[Vote], Dataset], list[dict[str, Any]]]] = {
    "label-studio": label_studio,
    "argilla": argilla,
}
