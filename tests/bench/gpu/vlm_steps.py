"""Steps of a vision-language model, against TRL's DPOTrainer."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from tests.bench.gpu.cells import Cells, Skipped
from tests.bench.gpu.figures import step_figures
from tests.bench.gpu.models import QWEN, vlm, vlm_rows
from tests.bench.step_flops import response_step_flops
from tests.bench.vlm_step import OURS, our_step, trl_step


def against_trl(cells: Cells) -> None:
    """TRL, separate sequences, shared prefix, and shared prefix with precomputed reference, each on a new model."""
    settings, device = cells.settings, cells.device
    size, precision = "tiny" if cells.tiny else settings["size"], settings["precision"]
    rows = vlm_rows(settings)

    def ours(name: str) -> dict[str, Any]:
        options = {"precision": precision, "gradient_checkpointing": settings["checkpointing"]}
        step = our_step(vlm(size, precision, device), rows, **OURS[name], **options)
        return step_figures(step, device, rounds=settings["rounds"])

    def trl() -> dict[str, Any]:
        if importlib.util.find_spec("trl") is None:
            raise Skipped("trl is not installed: pip install -e '.[bench]'")
        options = {"head": device == "cuda", "precision": precision, "checkpointing": settings["checkpointing"]}
        step = trl_step(vlm(size, precision, device), QWEN, rows, **options)
        return step_figures(step, device, rounds=settings["rounds"])

    for name in settings["variants"]:
        cells.measure(name, lambda name=name: trl() if name == "trl" else ours(name))
    steps = response_step_flops(
        size, settings["image_tokens"], settings["response_tokens"], checkpointing=settings["checkpointing"]
    )
    cells.measure("flops", lambda: _flops(steps, settings["pairs"]))


def _flops(steps: dict[str, float], pairs: int) -> dict[str, Any]:
    assert all(math.isfinite(value) for value in steps.values())
    return {
        "step_gflop": {name: pairs * value / 1e9 for name, value in steps.items()},
        "allow": {name: steps["trl_head"] / value for name, value in steps.items() if name != "trl_head"},
    }
