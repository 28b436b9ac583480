"""A LoRA run in half precision: weights in half precision and no autocast, gradients and errors in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import sigmoid
from dpo_mm.policies.lora_layers import lora_layers
from dpo_mm.training.builders import build_policy
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.half_precision import autocast, needs_autocast
from dpo_mm.training.memory_estimate import PeakMemoryMode
from dpo_mm.training.reference import adapter_off
from dpo_mm.training.trainer import PreferenceTrainer


def trainer_of(model: str, pairs: str, out: str, **changes: Any) -> tuple[PreferenceTrainer, Any]:
    """A trainer and a batch of two pairs."""
    settings: dict[str, Any] = {"batch_size": 2, "eval_fraction": 0.0, "beta": 2000.0, "precision": "bf16"}
    config = TrainConfig(model, pairs, out, **{**settings, **changes})
    policy = build_policy(config)
    rows = encode_splits(policy, config).rows
    policy.free_encoders()
    policy.prepare(config)
    trainer = PreferenceTrainer(policy, config, rows)
    return trainer, policy.collate([{**rows[n], "visit": 0} for n in range(2)])


def trained_parameters(trainer: PreferenceTrainer) -> list[torch.nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]


def test_lora_step_has_no_autocast_and_stores_no_float32_inputs(tiny_model: str, pairs: str, out: str) -> None:
    """Catches autocast around weights that are bf16 already, and PEFT's cast of each layer's input to float32."""
    trainer, batch = trainer_of(tiny_model, pairs, out)
    model, seen = trainer.policy.model, set()
    layers = lora_layers(model)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    stored, gradients = [], []
    for casts in (False, True):
        assert layers[0].cast_input_dtype_enabled is casts
        with PeakMemoryMode() as memory:
            loss = trainer.compute_loss(model, batch)
            stored.append(memory.now)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained_parameters(trainer) if p.grad is not None]))
        model.zero_grad()
        for layer in layers:
            layer.cast_input_dtype_enabled = True
    assert seen == {False} and stored[0] < 0.9 * stored[1]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999 and not torch.equal(*gradients)


def test_full_run_has_autocast(tiny_model: str, pairs: str, out: str) -> None:
    trainer, _ = trainer_of(tiny_model, pairs, out, tuning="full")
    with trainer.accelerator.autocast():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    config = TrainConfig("-", "-", "-", precision="bf16")
    assert not needs_autocast(config) and needs_autocast(trainer.config)
    with autocast(config, "cpu"):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"train_text_encoder": True}, {"quantize": "int8"}], ids=str)
def test_bf16_step_starts_at_ln_2_and_has_gradients_near_those_of_float32(
    changes: dict[str, Any], tiny_model: str, pairs: str, out: str
) -> None:
    """Catches inputs that PEFT does not cast, and gradients in bf16."""
    gradients = []
    for precision in ("fp32", "bf16"):
        trainer, batch = trainer_of(tiny_model, pairs, out, precision=precision, **changes)
        loss = trainer.compute_loss(trainer.policy.model, batch)
        loss.backward()
        if "use_dora" not in changes or precision == "fp32":  # DoRA divides by a norm that is rounded
            assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        trained = trained_parameters(trainer)
        assert {p.dtype for p in trained} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert gradients[1].dtype == torch.float32 and gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_gradients_in_fp16_can_be_unscaled(tiny_model: str, pairs: str) -> None:
    """Catches LoRA weights in fp16, whose gradients a scaler refuses."""
    config = TrainConfig(tiny_model, pairs, "-", precision="fp16", eval_fraction=0.0)
    policy = build_policy(config)
    rows = encode_splits(policy, config).rows
    policy.prepare(config)
    batch = policy.collate([{**rows[n], "visit": 0} for n in range(2)])
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trained), torch.amp.GradScaler("cpu", init_scale=1024)
    reference = adapter_off(policy)(policy.model, batch)
    loss = sigmoid(policy.log_probs(policy.model, batch), reference, beta=100).mean()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
