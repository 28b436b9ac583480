"""Optimizers and memory formats: time of a whole step and of the optimizer's part, and memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dpo_mm.training.builders import training_arguments
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.gpu.cells import Cells, Skipped
from tests.bench.gpu.figures import MIB, allocated, peak_bytes, seconds_of
from tests.bench.gpu.models import image_config, image_policy, prepare


def compare(cells: Cells) -> None:
    """Runs of one image generator that differ in one setting."""
    for name, run in cells.settings["runs"].items():
        cells.measure(name, lambda run=run: _run(cells, dict(run)))


def _run(cells: Cells, run: dict[str, Any]) -> dict[str, Any]:
    settings, device = cells.settings, cells.device
    channels_last = run.pop("channels_last", False)
    config = image_config(settings["pairs"], precision=settings["precision"], **run)
    try:
        training_arguments(config)
    except ValueError as error:  # a package or a card that the optimizer needs
        raise Skipped(str(error)) from None
    precision = config.precision if config.tuning == "lora" else "fp32"
    policy, make_rows = image_policy(settings["model"], precision, device, tiny=cells.tiny)
    prepare(policy, config)
    if channels_last:
        policy.model.to(memory_format=torch.channels_last)
    rows = make_rows(settings["pairs"])
    trainer = PreferenceTrainer(policy, config, rows)
    optimizer = trainer.create_optimizer()
    trained = [p for p in policy.model.parameters() if p.requires_grad]

    def backward() -> None:
        batch = trainer._prepare_inputs(policy.collate(rows))
        trainer.compute_loss(policy.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        trainer._metrics["train"].clear()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        backward()
        update()

    step()
    step()
    rounds = range(settings["rounds"])
    whole = [1000 * seconds_of(step, device) for _ in rounds]
    parts = [[1000 * seconds_of(part, device) for part in (backward, update)] for _ in rounds]
    resident = allocated(device)
    return {
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "ms": statistics.median(whole),
        "all_ms": whole,
        "update_ms": statistics.median(update_ms for _, update_ms in parts),
        "trained": sum(p.numel() for p in trained),
        "resident_mib": None if resident is None else resident / MIB,
        "step_mib": peak_bytes(step, device) / MIB,
    }
