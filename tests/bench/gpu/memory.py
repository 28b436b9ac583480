"""Measured peak of a training step against the estimate of a run's plan."""

from __future__ import annotations

from typing import Any

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm.meta_model import without_checks
from dpo_mm.training.memory_estimate import Counts, count_images, count_responses
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import MIB, allocated, peak_bytes, synchronise
from tests.bench.gpu.models import image_config, image_policy, on_meta_device, prepare, vlm, vlm_policy, vlm_rows
from tests.bench.vlm_step import config_of


def peaks(cells: Cells) -> None:
    """Image generators with these settings of TrainConfig, then vision-language models."""
    settings = cells.settings
    for row in settings["images"]:
        name, run = row["model"], {key: value for key, value in row.items() if key != "model"}
        label = ", ".join([name, *(f"{key} {value}" for key, value in run.items())])
        cells.measure(label, lambda name=name, run=run: _image_generator(cells, name, run))
    for size in settings["sizes"]:
        for layout in ("separate", "shared_prefix"):
            cells.measure(
                f"Qwen2.5-VL-{size}, {layout}", lambda size=size, layout=layout: _language_model(cells, size, layout)
            )


def _image_generator(cells: Cells, name: str, run: dict[str, Any]) -> dict[str, Any]:
    config = image_config(run.get("batch_size", 1), **{**run, "precision": cells.settings["precision"]})
    precision = config.precision if config.tuning == "lora" else "fp32"
    planned = on_meta_device(name, precision, tiny=cells.tiny)
    planned.prepare(config)
    counts = count_images(planned, config)
    policy, make_rows = image_policy(name, precision, cells.device, tiny=cells.tiny)
    return _compare(cells, policy, config, make_rows(config.batch_size), counts)


def _language_model(cells: Cells, size: str, layout: str) -> dict[str, Any]:
    settings = cells.settings
    size = "tiny" if cells.tiny else size
    config = config_of(settings["pairs"], precision=settings["precision"], gradient_checkpointing=True)
    planned = without_checks(vlm_policy(vlm(size, config.precision, "meta"), layout))
    encoded = planned.encode(vlm_rows(settings))
    planned.prepare(config)
    counts = count_responses(planned, config, encoded[0])
    policy = vlm_policy(vlm(size, config.precision, cells.device), layout)
    return _compare(cells, policy, config, policy.encode(vlm_rows(settings)), counts)


def _compare(cells: Cells, policy: Any, config: TrainConfig, rows: list[Any], counts: Counts) -> dict[str, Any]:
    """Train one step, which makes the optimizer's state, and measure the second."""
    device, estimate = cells.device, counts.memory(config)
    prepare(policy, config)
    trainer = PreferenceTrainer(policy, config, rows)
    weights = allocated(device)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], foreach=False)

    def step() -> None:
        batch = trainer._prepare_inputs(policy.collate(rows[: config.batch_size]))
        trainer.compute_loss(policy.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trainer._metrics["train"].clear()

    step()
    synchronise(device)
    resident = allocated(device)
    step_mib = peak_bytes(step, device) / MIB
    estimated = {
        name: getattr(estimate, name) / MIB for name in ("weights", "reference", "optimizer", "step", "training")
    }
    return {
        "estimate_mib": estimated,
        "step_mib": step_mib,
        "step_ratio": estimated["step"] / step_mib,
        "weights_mib": None if weights is None else weights / MIB,
        "training_mib": None if resident is None else resident / MIB + step_mib,
        "training_ratio": None if resident is None else estimated["training"] / (resident / MIB + step_mib),
    }
