"""Which change of a run's settings makes it fit a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.training.memory_estimate import Counts, quantized_bytes
from dpo_mm.training.memory_plan import memory_lines, possible_changes

GIB = 2**30


def config(**changes: Any) -> TrainConfig:
    return TrainConfig("-", "-", "-", **{"batch_size": 4, **changes})


def count(said: TrainConfig) -> Counts:
    """A model of 8 GiB in one linear layer, with 4 GiB of activations per pair, or 1 with checkpointing."""
    step = said.batch_size * (1 if said.gradient_checkpointing else 4) * GIB
    layers = (torch.Size([2**16, 2**16]),)
    return Counts(8 * GIB, layers, (), 2, (torch.Size([2**14, 2**14]),), step)


@pytest.mark.parametrize(
    ("vram", "verdict"),
    [
        (48, "fits 48 GB, takes 26.0 GB"),
        (24, "does not fit 24 GB; with gradient_checkpointing: true it takes 14.0 GB"),
        (12, "does not fit 12 GB; with gradient_checkpointing: true, batch_size: 1 and accumulate: 4 it takes 11.0 GB"),
    ],
)
def test_verdict_names_the_cheapest_change_and_its_memory(vram: float, verdict: str) -> None:
    assert memory_lines(config(), count, vram=vram)["fits"] == verdict


def test_no_verdict_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(memory_lines(config(), count, vram=None)) == ["memory"]
    with pytest.raises(ValueError, match="vram is 0"):
        memory_lines(config(), count, vram=0)


def test_model_that_does_not_run_without_values_has_no_estimate() -> None:
    def fail(_: TrainConfig) -> Counts:
        raise NotImplementedError("no kernel")

    assert memory_lines(config(), fail, vram=24) == {}


def test_quantize_of_a_plan_is_counted_on_a_machine_without_it() -> None:
    memory = memory_lines(config(quantize="nf4", batch_size=1), count, vram=24)
    assert memory["fits"] == "fits 24 GB, takes 16.1 GB"
    assert "weights 2.06 GiB" in memory["memory"]


def test_full_tuning_saves_the_frozen_copy_and_optimizer_state() -> None:
    changes = list(possible_changes(config(tuning="full", gradient_checkpointing=True, batch_size=1)))
    assert changes == [
        {"reference": "precomputed"},
        {"optimizer": "adamw_8bit"},
        {"reference": "precomputed", "optimizer": "adamw_8bit"},
    ]
    images = next(possible_changes(config(tuning="full", gradient_checkpointing=True, batch_size=1), fixed_draws=True))
    assert images == {"reference": "precomputed", "fixed_draws_per_row": 1}


def test_encoders_of_a_pipeline_are_on_the_card_one_after_the_other() -> None:
    """It catches the sum of text encoders, autoencoder and denoiser as the memory before training."""
    counts = Counts(8 * GIB, (), (torch.Size([2**16, 2**15]),), 2, (), 0, text_encoders=5 * GIB, autoencoder=3 * GIB)
    assert counts.memory(config()).encoding == 5 * GIB
    assert counts.memory(config(quantize="nf4")).encoding == 3 * GIB


@pytest.mark.parametrize(("kind", "per_weight"), [("nf4", 0.516), ("int8", 1.001), ("fp8", 1.001)])
def test_bytes_of_a_quantised_weight_include_its_scales(kind: str, per_weight: float) -> None:
    assert quantized_bytes((3072, 4096), kind) / (3072 * 4096) == pytest.approx(per_weight, abs=5e-4)
