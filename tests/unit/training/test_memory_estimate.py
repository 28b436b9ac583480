"""What a dry run counts: without weights, for every family, and near what a step takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm.meta_model import load_vlm_on_meta_device, without_checks
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training import memory_estimate
from dpo_mm.training.builders import OPTIMIZERS, build_policy, training_arguments
from dpo_mm.training.memory_estimate import PeakMemoryMode, count_images, count_responses, state_bytes
from dpo_mm.training.run import dry_run, train
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS


def config(model: str, **changes: Any) -> TrainConfig:
    return TrainConfig(model, "-", "-", **{"batch_size": 2, **changes})


def of(model: str, **changes: Any) -> Any:
    policy = build_policy(config(model, **changes), weights=False)
    policy.prepare(config(model, **changes))
    return count_images(policy, config(model, **changes)).memory(config(model, **changes))


def test_peak_counts_tensors_that_are_alive() -> None:
    with PeakMemoryMode() as alive:
        one = torch.zeros(256)
        view = one[:10]
        two = one + 1
        assert (alive.now, alive.peak) == (2048, 2048)
        del two
        assert (alive.now, alive.peak) == (1024, 2048)
        one.add_(1)
        assert alive.now == 1024
        del one
        assert alive.now == 1024
        del view
        assert alive.now == 0


def test_fake_tensor_peak_equals_the_real_peak(tiny_model: str) -> None:
    """The same counting on the real step gives the same peak."""
    policy = load_policy(tiny_model)
    policy.prepare(config(tiny_model))
    rows = [memory_estimate._row(policy)] * 2
    policy.free_encoders()
    batch = policy.collate(rows)
    with PeakMemoryMode() as real:
        memory_estimate._step(policy, config(tiny_model), batch)
    assert of(tiny_model).step == pytest.approx(real.peak, rel=0.02)


QUICK = {"qwen-image", "z-image"}
"""They cut prompts to the longest one's length, which is a number and no shape."""


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in BUILDERS])
def test_memory_of_each_family_is_estimated_without_weights(family: str, tmp_path: Path) -> None:
    folder = BUILDERS[family].build(tmp_path / "model")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    memory = of(str(folder), resolution=BUILDERS[family].size)
    assert min(memory.weights, memory.optimizer, memory.step, memory.encoding) > 0
    assert memory.reference == 0


VLMS = [
    "qwen2_5_vl",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("llava_next", "qwen3_vl", "gemma3", "idefics3")),
]


@pytest.mark.parametrize("family", VLMS)
def test_memory_of_a_vlm_equals_the_real_peak(family: str, tmp_path: Path) -> None:
    """Image grids, masks and positions have values on the meta device, so that models that read them run."""
    said = config(tiny_vlms.save(family, tmp_path), beta=0.1, accumulate=1)
    real = without_checks(VisionLanguage.load(said.model))
    row = real.encode(tiny_vlms.rows(family, (1,)))[0]
    real.prepare(said)
    batch = real.collate([row] * 2)
    with PeakMemoryMode() as alive:
        memory_estimate._step(real, said, batch)
    policy = load_vlm_on_meta_device(said.model, revision=None, precision="fp32")
    policy.prepare(said)
    assert count_responses(policy, said, row).step == pytest.approx(alive.peak, rel=0.02)


@pytest.mark.slow
def test_settings_change_the_memory_estimate(tiny_model: str) -> None:
    plain = of(tiny_model)
    spared = of(tiny_model, gradient_checkpointing=True, precision="bf16")
    assert spared.step < plain.step and spared.weights < 0.6 * plain.weights
    whole = of(tiny_model, tuning="full", batch_size=4)
    assert whole.step > 1.8 * plain.step
    assert whole.reference == whole.weights and whole.optimizer == pytest.approx(2 * whole.weights, rel=0.01)


def test_run_accepts_another_optimizer(tiny_model: str, pairs: str, out: str) -> None:
    said = dataclasses.replace(
        config(tiny_model, optimizer="adafactor", steps=2, log_every=1), pairs=pairs, output_dir=out
    )
    history = train(dataclasses.replace(said, learning_rate=1e-3)).history
    assert history[1]["loss"] != history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_dry_run_reports_memory_and_disk_without_weights(
    tiny_model: str, pairs: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    said = dry_run(dataclasses.replace(config(tiny_model), pairs=pairs, output_dir=out))
    assert "MiB to train" in said["memory"] and "activations" in said["memory"]
    assert said["disk"].endswith("for 12 pairs of 3 prompts, encoded")
    assert not Path(out).exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizer_state_equals_the_estimate(optimizer: str) -> None:
    layer = nn.Linear(96, 64)
    kinds: dict[str, Callable[..., Any]] = {"adamw": torch.optim.AdamW}
    if optimizer == "adafactor":
        from transformers.optimization import Adafactor

        kinds["adafactor"] = lambda parameters: Adafactor(parameters, lr=1e-3, relative_step=False)
    tuned = kinds[optimizer](layer.parameters())
    layer(torch.ones(1, 96)).sum().backward()
    tuned.step()
    state = [t for kept in tuned.state.values() for t in kept.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    held = sum(t.numel() * t.element_size() for t in state)
    assert held == sum(state_bytes(parameter.shape, optimizer) for parameter in layer.parameters())


def test_optimizer_names_are_those_of_the_trainer(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    names = {
        name: training_arguments(config(tiny_model, optimizer=name)).optim.value  # type: ignore[union-attr]
        for name in OPTIMIZERS
        if not name.startswith("paged")
    }
    short = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
    same = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "adafactor")
    assert names == short | {name: name for name in same}
    assert state_bytes((64, 64), "adamw_8bit") == state_bytes((64, 64), "adamw_bnb_8bit") == 2 * 4096 + 8 * 16
    for name in ("paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(ValueError, match=f"optimizer '{name}' needs an NVIDIA GPU"):
            training_arguments(config(tiny_model, optimizer=name))
    with pytest.raises(ValueError, match=r"optimizer 'adam' is unknown; did you mean 'adamw'\?"):
        training_arguments(config(tiny_model, optimizer="adam"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'adamw_8bit' needs bitsandbytes; pip install 'dpo-mm\[8bit\]'"):
        training_arguments(config(tiny_model, optimizer="adamw_8bit"))
