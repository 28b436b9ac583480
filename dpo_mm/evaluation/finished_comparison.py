"""Ingredients of a comparison, and the result of a finished one, which is not made again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dpo_mm.config import CompareConfig, CompareResponsesConfig, as_dict
from dpo_mm.content_key import content_hash, library_versions
from dpo_mm.data.prompts import read_prompt_set
from dpo_mm.data.questions import WORLDS, read_questions
from dpo_mm.evaluation.compare_images import list_checkpoints
from dpo_mm.evaluation.image_store import FOLDER, MANIFEST, SCORES
from dpo_mm.evaluation.response_sampling import RESPONSES_FILE
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.verdict import CompareResult
from dpo_mm.judges import judge_digests
from dpo_mm.outputs import OutputKind
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.families import model_content

COMPARISON = OutputKind(
    "comparison.json",
    "made",
    results=("report.html", "metrics.json", "contact_sheet.png"),
    free=("output_dir", "overwrite"),  # a batch's size changes the rounding of what it generates
)


def ingredients(config: CompareConfig | CompareResponsesConfig, sft_adapter: str | None = None) -> dict[str, Any]:
    """Return what decides the result of a comparison, see `dpo_mm.content_key`.

    Args:
        config: settings of the comparison.
        sft_adapter: folder of the adapter of the SFT baseline.
    """
    adapters = [name for name in (config.adapter, config.base_adapter, sft_adapter) if name]
    if isinstance(config, CompareConfig):
        adapters += [folder for _, folder in list_checkpoints(config)]
        prompts: Any = read_prompt_set(config.prompts, limit=config.max_prompts)
    elif config.questions in WORLDS:  # the library's version decides them
        prompts = config.questions
    else:
        prompts = [question.content for question in read_questions(config.questions, limit=config.max_questions)]
    return {
        "settings": as_dict(config),
        "model": model_content(config.model, revision=config.revision),
        "adapters": {name: adapter_content(name) for name in adapters},
        "prompts": content_hash(prompts),
        "judges": judge_digests(config.judges),
        "libraries": library_versions(),
    }


def read_result(folder: Path) -> CompareResult:
    """Read the result of a finished comparison."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    names = [field.name for field in dataclasses.fields(Comparison)]
    comparisons = [
        Comparison(**{**{name: row[name] for name in names}, "models": tuple(row["models"])})
        for row in metrics["comparisons"]
    ]
    return CompareResult(metrics["verdict"], tuple(comparisons), tuple(metrics["notes"]), folder / "report.html")


def saved_lines(folder: Path) -> str:
    """Describe the images, scores and responses of a comparison on disk, for the message of an interruption."""
    files = {
        "images": folder / FOLDER / MANIFEST,
        "scores": folder / FOLDER / SCORES,
        "responses": folder / RESPONSES_FILE,
    }
    counts = {name: len(path.read_bytes().splitlines()) for name, path in files.items() if path.is_file()}
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    return f"{' and '.join(parts)} are in {folder}" if parts else ""
