"""What the host does in a step on a GPU: how often it waits, and which processes load rows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dpo_mm.config import TrainConfig
from dpo_mm.training.builders import training_arguments
from dpo_mm.training.trainer import SHARED_MEMORY, default_workers
from tests.operation_counts import OperationCounts
from tests.unit.training.test_half_precision import trainer_of


class CountOneStep(TrainerCallback):
    """Count the second step of a run, with what comes between it and the third."""

    def __init__(self) -> None:
        self.counts, self.steps = OperationCounts(), 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            self.counts.__enter__()
        elif self.steps == 3:
            self.counts.__exit__(None, None, None)


def test_image_step_waits_once_for_the_gpu(tiny_model: str, pairs: str, out: str) -> None:
    """Catches a filter of losses that reads each one, a schedule that is copied in each step, and a norm that is read."""
    trainer, _ = trainer_of(tiny_model, pairs, out, steps=3, log_every=100)
    counter = CountOneStep()
    schedule = trainer.policy.noise_process  # type: ignore[union-attr]
    schedule._on_device[torch.device("cpu")] = schedule.alphas_cumprod.clone()
    counter.counts.mark_on_host(schedule.alphas_cumprod)
    trainer.add_callback(counter)
    trainer.train()
    assert counter.counts.num_synchronisations == 1, counter.counts.report()  # that the gradient is finite
    assert counter.counts.attention > 0 and counter.counts.operations["_fused_adamw_"] > 0


@pytest.mark.parametrize(
    ("modality", "device", "streamed", "free", "expected"),
    [
        ("image", "cuda", False, SHARED_MEMORY, 2),
        ("image", "cuda", False, SHARED_MEMORY - 1, 0),
        ("image", "cpu", False, SHARED_MEMORY, 0),
        ("text", "cuda", False, SHARED_MEMORY, 0),
        ("text", "cpu", True, 0, 4),
    ],
)
def test_images_have_loader_processes_on_a_gpu_with_room_for_batches(
    modality: Any, device: str, streamed: bool, free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
    assert default_workers(modality, device, streamed) == expected


def test_batches_are_pinned_and_copied_without_waiting_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not training_arguments(TrainConfig("-", "-", "-")).accelerator_config.non_blocking
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made: dict[str, Any] = {}
    monkeypatch.setattr("dpo_mm.training.builders.TrainingArguments", lambda **values: made.update(values))
    training_arguments(TrainConfig("-", "-", "-", precision="fp32"))
    assert made["accelerator_config"] == {"non_blocking": True} and made["dataloader_pin_memory"]
