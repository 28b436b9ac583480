"""Open models and pipelines, and refuse one whose files do not have all of its weights.

diffusers and transformers fill missing tensors with random numbers and go on. A base with random weights trains, and the
comparison looks plausible, so every model is opened by the two functions here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

HARMLESS = ("position_ids", "inv_freq", "num_batches_tracked", "embed_positions.weights")
"""Ends of tensor names that older releases saved and newer ones compute."""
SHOWN = 3


def load_module(cls: Any, source: str, *, label: str = "", **options: Any) -> Any:
    """Load a diffusers or transformers model from safetensors and check its loading report.

    Args:
        cls: the model's class, or an auto class.
        source: folder or hub id.
        label: the part of a pipeline that it is, for the error.
        **options: further arguments of `from_pretrained`, such as subfolder, revision and dtype.

    Raises:
        ValueError: if tensors are missing, unexpected or of another shape. It names them.
    """
    name = f"model {source!r}{label and f', {label}'}"
    if not cls.__module__.startswith("diffusers."):  # diffusers raises for other shapes, and says which
        options["ignore_mismatched_sizes"] = True
    try:
        module, report = cls.from_pretrained(source, output_loading_info=True, use_safetensors=True, **options)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())[:200]}") from error
    check_report(report, name)
    return module


def check_report(report: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a loading report lists tensors that are missing, unexpected or of another shape.

    Args:
        report: missing_keys, unexpected_keys and mismatched_keys, as both libraries return them.
        name: the model, for the error.
    """
    missing = _names(report.get("missing_keys", ()))
    mismatched = _names(report.get("mismatched_keys", ()))
    unexpected = _names(report.get("unexpected_keys", ()))
    problems = [
        f"{len(tensors)} {problem} ({', '.join(tensors[:SHOWN])}{', ...' * (len(tensors) > SHOWN)})"
        for problem, tensors in (
            ("missing", missing),
            ("of another shape than its config says", mismatched),
            ("that its class does not have", unexpected),
        )
        if tensors
    ]
    if problems:
        raise ValueError(f"{name}: tensors {'; '.join(problems)}. Download or save the model again")


def _names(tensors: Iterable[Any]) -> list[str]:
    names = {tensor if isinstance(tensor, str) else tensor[0] for tensor in tensors}
    return sorted(name for name in names if not name.endswith(HARMLESS))


def load_pipeline(cls: Any, source: str, *, revision: str | None, dtype: torch.dtype, **parts: Any) -> Any:
    """Load a diffusers pipeline, each of its models by `load_module`.

    Args:
        cls: the pipeline's class, or `DiffusionPipeline`.
        source: folder or hub id.
        revision: of a hub model.
        dtype: of all weights.
        **parts: parts that are not to be loaded, such as safety_checker=None, and further arguments.

    Raises:
        ValueError: as `load_module`.
    """
    index, variant = cls.load_config(source, revision=revision), {}
    for name, entry in index.items():
        if name in parts or not isinstance(entry, list | tuple) or entry[0] not in ("diffusers", "transformers"):
            continue
        part = getattr(importlib.import_module(entry[0]), entry[1], None)
        if isinstance(part, type) and issubclass(part, nn.Module):
            options = {"label": name, "subfolder": name, "revision": revision, "dtype": dtype}
            try:
                parts[name] = load_module(part, source, **options)
            except OSError:  # no file without a variant, as in many models for SDXL
                variant = {"variant": "fp16"}
                parts[name] = load_module(part, source, **options, **variant)
    return cls.from_pretrained(source, revision=revision, dtype=dtype, use_safetensors=True, **variant, **parts)
