"""Votes in the JSON formats of other annotation tools: tasks of Label Studio and records of Argilla.

Every vote is written with its annotator. Repeats and skips are written if the format supports them. Images are embedded
in the file, in their original encoding.
"""

from __future__ import annotations

import base64
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dpo_mm.data.schema import prompt_images
from dpo_mm.labels.pairs import file_bytes
from dpo_mm.labels.response_pairs import is_response, response_texts
from dpo_mm.labels.store import Vote

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = ("model_a", "model_b", "chosen_model", "rejected_model", "source", "license")
USER_ID_NAMESPACE = uuid.UUID("5b1d0b39-9a0e-5d0c-8f7b-6c1d6a8f2f11")
"""Namespace of the user ids that Argilla requires. A name always gives the same id."""


def label_studio_tasks(votes: Sequence[Vote], rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield tasks with annotations for an interface with `Choices name="preference" toName="prompt"`.

    a and b are those of the dataset, whether a was on the left or on the right.

    Source: task format of Label Studio.
    """
    return (
        {
            "data": {"id": row["id"], **pair_fields(row)},
            "annotations": [
                {
                    "completed_by": {"email": vote.annotator},
                    "created_at": datetime.fromtimestamp(vote.cast_at, UTC).isoformat(),
                    "lead_time": round(vote.seconds, 3),
                    "was_cancelled": vote.choice == "skip",
                    "result": [] if vote.choice == "skip" else [
                        {
                            "from_name": "preference",
                            "to_name": "prompt",
                            "type": "choices",
                            "value": {"choices": [vote.choice]},
                        }
                    ],
                }
                for vote in row_votes
            ],
        }
        for row, row_votes in _rows_with_votes(votes, rows)
    )  # fmt: skip


def argilla_records(votes: Sequence[Vote], rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield records as `Dataset.records.from_json` reads them, with one response `preference` per annotator.

    Argilla allows one response per annotator and record, so repeats and skips are left out.
    """
    return (
        {
            "id": row["id"],
            "fields": pair_fields(row),
            "metadata": {name: row[name] for name in METADATA if row.get(name)},
            "suggestions": {},
            "responses": {
                "preference": [
                    {"value": vote.choice, "user_id": str(uuid.uuid5(USER_ID_NAMESPACE, vote.annotator))}
                    for vote in row_votes
                    if not vote.is_repeat and vote.choice != "skip"
                ]
            },
            "vectors": {},
        }
        for row, row_votes in _rows_with_votes(votes, rows)
    )


def pair_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt and both sides of a pair: images as data URIs, or responses with the images of their prompt."""
    if not is_response(row):
        images = {column: data_uri(row[column]) for column in ("image_a", "image_b")}
        return {"prompt": row["prompt"], **images}
    texts = response_texts(row)
    images = {f"image_{number}": data_uri(cell) for number, cell in enumerate(prompt_images(row), start=1)}
    return {"prompt": texts.prompt, **images, "response_a": texts.a, "response_b": texts.b}


def data_uri(cell: dict[str, Any]) -> str:
    """Encode an undecoded image as a data URI, with unchanged bytes."""
    data = file_bytes(cell)
    formats = {
        b"\x89PNG": "png",
        b"\xff\xd8\xff": "jpeg",
        b"RIFF": "webp",
        b"BM": "bmp",
        b"II*\x00": "tiff",
        b"MM\x00*": "tiff",
    }
    format = next((format for start, format in formats.items() if data.startswith(start)), "png")
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"


def _rows_with_votes(votes: Sequence[Vote], rows: Dataset) -> Iterable[tuple[dict[str, Any], list[Vote]]]:
    """Yield the rows that have votes, with their votes, in the dataset's order."""
    votes_by_pair: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        votes_by_pair[vote.pair].append(vote)
    for row in rows:
        if row["id"] in votes_by_pair:
            yield row, votes_by_pair[row["id"]]


FORMATS: dict[str, Callable[[Sequence[Vote], Dataset], Iterator[dict[str, Any]]]] = {
    "label-studio": label_studio_tasks,
    "argilla": argilla_records,
}
