"""Each reference in each precision: it gives the log-probs of the start, and it does not change what the policy gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers.utils.peft_utils import set_adapter_layers

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.half_precision import autocast
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import build_reference
from tests.contracts import tiny_vlms

CASES = [
    (reference, precision, tuning)
    for reference in ("adapter_off", "frozen_copy", "moving_average", "synced")
    for precision in ("fp32", "bf16")
    for tuning in ("lora", "full")
    if (reference, tuning) != ("adapter_off", "full")
]


def image_batch(model: str, pairs: str, config: TrainConfig) -> tuple[Any, Any]:
    policy = load_policy(model, precision=config.precision if config.tuning == "lora" else "fp32")
    rows = encode_splits(policy, config).rows
    policy.prepare(config)
    stream = PairStream(rows, seed=0, length=4)
    return policy, policy.collate([stream[n] for n in range(3)])


def text_batch(model: str, pairs: str, config: TrainConfig) -> tuple[Any, Any]:
    policy = load_policy(model, precision=config.precision if config.tuning == "lora" else "fp32")
    rows = policy.encode(Dataset.from_list(tiny_vlms.rows("llama", (0, 0))))
    policy.prepare(config)
    return policy, policy.collate(rows)


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vlms.save("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize(("reference", "precision", "tuning"), CASES)
def test_reference_forward_uses_only_reference_weights(
    modality: str,
    reference: str,
    precision: str,
    tuning: str,
    tiny_model: str,
    tiny_text: str,
    pairs: str,
    tmp_path: Path,
) -> None:
    """Catches autocast's cache of casts: it gave the policy the weights of a tracking reference, and the loss stayed at ln 2."""
    config = TrainConfig(
        model=tiny_model if modality == "image" else tiny_text,
        pairs=pairs,
        output_dir=str(tmp_path),
        reference=reference,
        precision=precision,
        tuning=tuning,
        reference_sync_steps=8,
        eval_fraction=0.0,
    )
    policy, batch = (image_batch if modality == "image" else text_batch)(config.model, pairs, config)

    with torch.no_grad(), autocast(config, "cpu"):
        start = policy.log_probs(policy.model, batch)
    frozen = build_reference(policy, config)
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    with autocast(config, "cpu"):
        alone = policy.log_probs(policy.model, batch)
    (alone.chosen.sum() - alone.rejected.sum()).backward()
    gradients = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    with autocast(config, "cpu"):
        before = frozen(policy.model, batch)
        policy_logps = policy.log_probs(policy.model, batch)
        after = frozen(policy.model, batch)
    (policy_logps.chosen.sum() - policy_logps.rejected.sum()).backward()
    assert not torch.equal(alone.chosen, start.chosen)
    assert torch.equal(before.chosen, start.chosen) and torch.equal(before.rejected, start.rejected)
    assert torch.equal(after.chosen, start.chosen) and torch.equal(after.rejected, start.rejected)
    assert torch.equal(policy_logps.chosen, alone.chosen) and torch.equal(policy_logps.rejected, alone.rejected)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    for parameter, gradient in zip(trained, gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_adapter_is_switched_as_peft_does_without_a_walk_over_the_model(
    modality: str, tiny_model: str, tiny_text: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches PEFT's own functions, which walk over all modules in each step and change requires_grad."""
    is_image = modality == "image"
    config = TrainConfig(tiny_model if is_image else tiny_text, pairs, str(tmp_path), precision="fp32")
    policy, batch = (image_batch if is_image else text_batch)(config.model, pairs, config)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.05
    reference = build_reference(policy, config)
    found = reference(policy.model, batch)
    set_adapter_layers(policy.model, enabled=False)
    with torch.no_grad():
        expected = policy.log_probs(policy.model, batch)
        set_adapter_layers(policy.model, enabled=True)
        tuned = policy.log_probs(policy.model, batch)
    assert torch.equal(found.chosen, expected.chosen) and not torch.equal(found.chosen, tuned.chosen)
    walks: list[Any] = []
    named_modules = torch.nn.Module.named_modules
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda *args, **named: walks.append(args) or named_modules(*args, **named)
    )
    with policy.adapter_off():
        assert all(parameter.requires_grad for parameter in trained)
    assert not walks
    with torch.no_grad():
        assert torch.equal(policy.log_probs(policy.model, batch).chosen, tuned.chosen)
