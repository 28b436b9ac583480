"""Questions of POPE (coco_pope_random.json and its other files, one object per line).

Source: Li et al. 2023 (2305.10355), github.com/RUCAIBox/POPE (MIT).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_mm.data.benchmarks.image_folders import ImageFolders

KEYS = frozenset({"question_id", "image", "text", "label"})


def questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert rows of POPE. The images are those of COCO's val2014."""
    folders = ImageFolders(file)
    for row in rows:
        yield {
            "id": row["question_id"],
            "image": folders.find(row["image"]),
            "prompt": row["text"],
            "ground_truth": row["label"],
        }
