"""Questions of AMBER (data/query/query_generative.json, or another of its query files).

The ground truth of a description is JSON: the objects in the image (`truth`), and objects that models like to invent for it
(`hallu`). That of a question is yes or no. Both are in annotations.json, in the folder of the file or the one above.

Source: Wang et al. 2023 (2311.07397), github.com/junyangwang0410/AMBER (Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_mm.data.benchmarks.image_folders import ImageFolders
from dpo_mm.data.text_files import read_text
from dpo_mm.errors import name_row

KEYS = frozenset({"id", "image", "query"})
ANNOTATIONS = "annotations.json"


def questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert queries of AMBER. The category is the type of the task, such as "generative"."""
    folders, annotations = ImageFolders(file), _annotations(file)
    for number, row in enumerate(rows):
        annotation = annotations.get(row["id"])
        if annotation is None:
            raise ValueError(
                f"{file}, row {number}: id {row['id']!r:.40} is not in {ANNOTATIONS}. Use both as published"
            )
        is_description = annotation["type"] == "generative"
        yield {
            "id": row["id"],
            "image": folders.find(row["image"]),
            "prompt": row["query"],
            "ground_truth": {name: annotation[name] for name in ("truth", "hallu")}
            if is_description
            else annotation["truth"],
            "truth_is_response": not is_description,
            "category": annotation["type"],
        }


def _annotations(file: Path) -> dict[Any, dict[str, Any]]:
    path = next(
        (path for path in (file.parent / ANNOTATIONS, file.parent.parent / ANNOTATIONS) if path.is_file()), None
    )
    if path is None:
        raise ValueError(f"{file}: {ANNOTATIONS} is not in its folder and not in the one above. Copy AMBER's there")
    with name_row(str(path), "Use the file as published"):
        annotations = {entry["id"]: entry for entry in json.loads(read_text(path))}
        for entry in annotations.values():
            if entry["type"] == "generative" and not (entry["truth"] and entry["hallu"]):
                raise ValueError(f"id {entry['id']} has no truth or no hallu")
    return annotations
