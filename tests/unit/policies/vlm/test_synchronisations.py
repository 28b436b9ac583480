"""A training step of a vision-language model hardly lets the host wait for the GPU, counted on a CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm.packed_attention import pack_vision_attention
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.trainer import PreferenceTrainer
from tests.contracts.tiny_vlms import build, rows
from tests.operation_counts import OperationCounts

PLACEHOLDERS = (".item() in transformers/utils/import_utils.py", ".item() in transformers/models/")
"""What remains: transformers counts the image tokens for an error message and compares them with the features."""
QWEN_TOWER = (
    " in transformers/vision_utils.py",
    " in transformers/utils/generic.py",
    " in transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py",
    " in dpo_mm/policies/vlm/packed_attention.py",
)
"""The tower of Qwen2.5-VL reads the sizes of images from the GPU, once per step."""


def counts_of_step(family: str, layout: str, folder: Path) -> OperationCounts:
    """Counts of the second step: reference, policy, backward pass and optimizer."""
    model, processor = build(family)
    pack_vision_attention(model)
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
def test_step_waits_at_most_twice(layout: str, tmp_path: Path) -> None:
    counts = counts_of_step("llava", layout, tmp_path)
    assert counts.num_synchronisations <= 2, counts.report()
    assert all(str(call).startswith(PLACEHOLDERS) for call in counts.synchronisations), counts.report()


def test_language_model_with_positions_of_images_waits_at_most_twice(tmp_path: Path) -> None:
    counts = counts_of_step("qwen2_5_vl", "shared_prefix", tmp_path)
    reads = Counter(str(call).startswith(PLACEHOLDERS[0]) for call in counts.synchronisations)
    assert reads[True] == 1, counts.report()
    assert all(any(part in str(call) for part in (*PLACEHOLDERS, *QWEN_TOWER)) for call in counts.synchronisations)
    assert counts.num_synchronisations <= 18, counts.report()
