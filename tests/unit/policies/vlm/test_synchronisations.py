"""A training step of a vision-language model hardly lets the host wait for the GPU, counted on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm.host_values import TOWERS
from dpo_mm.policies.vlm.vision_features import vision_features
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.trainer import PreferenceTrainer
from tests.contracts.tiny_vlms import build, rows
from tests.operation_counts import OperationCounts

PLACEHOLDERS = (".item() in transformers/utils/import_utils.py", ".item() in transformers/models/")
"""What remains: transformers counts the image tokens for an error message and compares them with the features."""


def counts_of_step(family: str, layout: str, folder: Path) -> OperationCounts:
    """Counts of the second step: reference, policy, backward pass and optimizer."""
    model, processor = build(family)
    policy = VisionLanguage(model, processor, family, pair_layout=layout)
    config = TrainConfig(model="m", pairs="p", output_dir=str(folder), beta=0.1, batch_size=2, steps=2, lora_rank=4)
    encoded = policy.encode(rows(family, (2, 1)))
    policy.prepare(config)
    trainer = PreferenceTrainer(policy, config, encoded)
    trainer.create_optimizer()
    batches = [trainer._prepare_inputs(policy.collate(encoded)) for _ in range(2)]
    trainer.compute_loss(policy.model, batches[0])  # type: ignore[arg-type]
    with OperationCounts() as counts:
        trainer.compute_loss(policy.model, batches[1]).backward()  # type: ignore[arg-type]
        trainer._clip_grad_norm(policy.model)
        assert trainer.optimizer is not None
        trainer.optimizer.step()
    assert policy.token_log_probs.layout == layout
    return counts


@pytest.mark.parametrize("layout", ["shared_prefix", "separate"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_step_waits_at_most_twice(family: str, layout: str, tmp_path: Path) -> None:
    counts = counts_of_step(family, layout, tmp_path)
    assert counts.num_synchronisations <= 2, counts.report()
    assert all(str(call).startswith(PLACEHOLDERS) for call in counts.synchronisations), counts.report()


@pytest.mark.parametrize("family", TOWERS)
def test_tower_gives_the_same_features_without_waiting(family: str) -> None:
    """Images of different sizes. It catches arguments of other images, and another order of windows."""
    model, processor = build(family)
    policy = VisionLanguage(model, processor, family)
    batch = policy.collate(policy.encode(rows(family, (2, 1))))
    assert "tower" in batch
    own = vision_features(model, {"images": batch["images"]})
    with OperationCounts() as counts:
        features = vision_features(model, batch)
    assert counts.num_synchronisations == 0, counts.report()
    for feature, expected in zip(features["pooler_output"], own["pooler_output"], strict=True):
        assert torch.equal(feature, expected)
