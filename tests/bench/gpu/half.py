"""Margins in half precision against float32 on the same weights: error, and how often the sign of the loss's logit flips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_mm.policies.vlm.meta_model import without_checks
from dpo_mm.policies.vlm.vlm_policy import DTYPES
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import exact_float32
from tests.bench.gpu.models import image_config, image_policy, prepare, vlm, vlm_policy, vlm_rows
from tests.bench.vlm_step import config_of


def images(cells: Cells) -> None:
    """Image generators, in the trainer's own arithmetic."""
    settings = cells.settings
    for name in settings["models"]:

        def family(name: str = name) -> dict[str, Any]:
            policy, make_rows = image_policy(name, "fp32", cells.device, tiny=cells.tiny)
            config = image_config(settings["batch"], precision="fp32")
            prepare(policy, config)
            return _compare(policy, lambda precision: image_config(settings["batch"], precision=precision), settings,
                            make_rows(settings["pairs"]))  # fmt: skip

        cells.measure(name, family)


def responses(cells: Cells) -> None:
    """Vision-language models, with both layouts of a pair."""
    settings = cells.settings
    for size in settings["sizes"]:

        def family(layout: str, size: str = size) -> dict[str, Any]:
            policy = vlm_policy(vlm("tiny" if cells.tiny else size, "fp32", cells.device), layout)
            prepare(policy, config_of(settings["batch"]))
            without_checks(policy)  # a layout that the check refuses is measured too
            rows = policy.encode(vlm_rows(settings))
            return _compare(policy, lambda precision: config_of(settings["batch"], precision=precision), settings, rows)

        for layout in ("separate", "shared_prefix"):
            cells.measure(f"{size}, {layout}", lambda layout=layout: family(layout))


def _compare(policy: Any, config_in: Any, settings: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    """Margins in float32, and their differences in each half precision. Margins are beta times the log-ratio."""
    _round_frozen(policy, torch.bfloat16)
    _round_frozen(policy, torch.float32)
    with exact_float32():
        exact = _margins(policy, config_in("fp32"), rows)
    figures: dict[str, Any] = {"pairs": len(exact), "margin_std": float(exact.std()), "margins": exact.tolist()}
    for precision in settings["precisions"]:
        _round_frozen(policy, DTYPES[precision])
        margins, again = (_margins(policy, config_in(precision), rows) for _ in range(2))
        error = margins - exact
        figures[precision] = {
            "error_mean": float(error.mean()),
            "error_std": float(error.std()),
            "error_max": float(error.abs().max()),
            "error_std_over_margin_std": float(error.std() / exact.std()),
            "flips": int((margins.sign() != exact.sign()).sum()),
            "repeat_max": float((margins - again).abs().max()),
            "margins": margins.tolist(),
        }
    return figures


def _margins(policy: Any, config: Any, rows: list[Any]) -> Tensor:
    """Logits of the loss as the trainer computes them, (pairs,)."""
    policy.config = config
    trainer = PreferenceTrainer(policy, config, rows)
    size = config.batch_size
    for start in range(0, len(rows), size):
        batch = trainer._prepare_inputs(policy.collate(rows[start : start + size]))
        with torch.no_grad():
            trainer.compute_loss(policy.model, batch)
    return torch.cat([entry["rewards/margins"] for entry in trainer._metrics["eval"]]).double().cpu()


def _round_frozen(policy: Any, dtype: torch.dtype) -> None:
    """Cast the frozen weights. The adapter stays in float32, as in a run."""
    for parameter in policy.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if policy.modality == "image":
        policy.dtype = dtype
