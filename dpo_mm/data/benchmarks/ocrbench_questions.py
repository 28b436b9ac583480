"""Questions of OCRBench (OCRBench.json, 1,000 questions, or FullTest.json).

Source: Liu et al. 2023 (2305.07895), github.com/Yuliang-Liu/MultimodalOCR (MIT).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_mm.data.benchmarks.image_folders import ImageFolders

KEYS = frozenset({"dataset_name", "id", "image_path", "question", "answers", "type"})
FORMULAS = "HME100k"
"""Dataset whose answers are formulas. They are compared without spaces."""
WITHOUT_SPACES = "without_spaces"
"""Key of a ground truth that is compared without spaces."""


def questions(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Convert rows of OCRBench. The category is the type of the task, such as "Doc-oriented VQA"."""
    folders = ImageFolders(file)
    for row in rows:
        answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
        is_formula = row["dataset_name"] == FORMULAS
        yield {
            "id": f"{row['dataset_name']}-{row['id']}",
            "image": folders.find(row["image_path"]),
            "prompt": row["question"],
            "ground_truth": [{WITHOUT_SPACES: str(answer)} if is_formula else answer for answer in answers],
            "truth_is_response": not is_formula,
            "category": row["type"],
        }
