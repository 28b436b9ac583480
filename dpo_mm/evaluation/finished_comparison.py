"""Ingredients of a comparison, and the result of a finished one, which is not made again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dpo_mm.config import CompareConfig, CompareResponsesConfig, as_dict, default_settings
from dpo_mm.data.prompts import read_prompt_set
from dpo_mm.data.questions import WORLDS, read_questions
from dpo_mm.evaluation.compare_images import list_checkpoints
from dpo_mm.evaluation.image_store import FOLDER, MANIFEST, SCORES
from dpo_mm.evaluation.response_sampling import RESPONSES_FILE
from dpo_mm.evaluation.side_sets import judges_of, read_sets
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.verdict import CompareResult
from dpo_mm.files.content_key import content_hash, library_versions
from dpo_mm.files.outputs import OutputKind
from dpo_mm.judges import judge_digests
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.families import model_content

COMPARISON = OutputKind(
    "comparison.json",
    "made",
    results=("report.html", "metrics.json", "contact_sheet.png"),
    # not batch_size, which changes the rounding of what is generated
    free=("output_dir", "overwrite", "server", "server_timeout"),
    defaults=default_settings(CompareConfig, CompareResponsesConfig),
)


def ingredients(config: CompareConfig | CompareResponsesConfig, sft_adapter: str | None = None) -> dict[str, Any]:
    """Return what decides the result of a comparison, see `dpo_mm.files.content_key`.

    Args:
        config: settings of the comparison.
        sft_adapter: folder of the adapter of the SFT baseline.
    """
    adapters = [name for name in (config.adapter, config.base_adapter, sft_adapter) if name]
    if isinstance(config, CompareConfig):
        adapters += [folder for _, folder in list_checkpoints(config)]
    prompts, *sides = [content for _, content in _read_content(config)]
    served = isinstance(config, CompareResponsesConfig) and config.server is not None
    return {
        "settings": as_dict(config) | ({"batch_size": "of the server"} if served else {}),
        "model": None if served else model_content(config.model, revision=config.revision),
        "adapters": {name: adapter_content(name) for name in adapters},
        "prompts": content_hash([prompts, *sides] if sides else prompts),
        "judges": judge_digests(judges_of(config)),
        "libraries": library_versions(),
    }


def _read_content(config: CompareConfig | CompareResponsesConfig) -> list[tuple[Any, Any]]:
    """Return settings and content of what is compared, then of each side set."""
    if isinstance(config, CompareConfig):
        read_prompts = lambda own: read_prompt_set(own.prompts, limit=own.max_prompts)
        sets = read_sets(config, read_prompts, lambda prompt_set: len(prompt_set.prompts))
        return [(own, prompt_set.content) for own, prompt_set in sets]
    return [*read_sets(config, _questions_content, len)]


def _questions_content(config: CompareResponsesConfig) -> Any:
    """Return the questions as plain values, or the name of a synthetic dataset, which the library's version decides."""
    if config.questions in WORLDS:
        return config.questions
    questions = read_questions(config.questions, limit=config.max_questions, part=config.part)
    return [question.content for question in questions]


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
