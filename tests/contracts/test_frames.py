"""Every family trains at a size that is not square.

Chosen and rejected are cropped to it, the denoiser is conditioned on it, and the error covers all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.data.clips import clip_image
from dpo_mm.policies.diffusion.buckets import buckets_of
from dpo_mm.policies.diffusion.denoising_errors import pair_errors
from dpo_mm.training.reference import adapter_off
from tests.conftest import noise_image
from tests.contracts.families import BUILDERS, WORDS
from tests.contracts.test_diffusion import encoded_prompts, load_family, source_columns


def rows_at_size(policy: Any, target_size: tuple[int, int]) -> list[dict[str, Any]]:
    prompt = {name: value[0] for name, value in encoded_prompts(policy, WORDS[:1]).items()}
    row: dict[str, Any] = {"id": "row", "visit": 0, "prompt": prompt}
    with policy.at_size(target_size):
        row |= source_columns(policy, 0)
        for number, side in enumerate(("chosen", "rejected")):
            image = clip_image([noise_image(number, 96).resize((90, 61))] * policy.frames)
            mean, std = policy.encode_images([image])
            row |= {f"{side}_mean": mean[0], f"{side}_std": std[0]}
            row |= {f"{side}_{name}": value[0] for name, value in policy.size_conditioning([image]).items()}
    return [row]


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_trains_at_a_wide_size(family: str, tmp_path: Path) -> None:
    size = BUILDERS[family].size
    policy = load_family(family, str(BUILDERS[family].build(tmp_path / "model")))
    policy.prepare(TrainConfig("-", "-", "-"))
    unit = policy.patch * policy.pipe.vae_scale_factor
    target_size = next(bucket for bucket in buckets_of(size, unit) if bucket[0] > bucket[1])
    batch = policy.collate(rows_at_size(policy, target_size))
    height, width = batch["chosen"].shape[-2:]
    assert width / height == pytest.approx(target_size[0] / target_size[1])
    assert batch["rejected"].shape == batch["noise"].shape == batch["chosen"].shape
    reference, log_probs = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(reference.chosen, log_probs.chosen) and torch.isfinite(log_probs.chosen).all()
    assert pair_errors(policy, policy.model, batch).residual.numel() == 2 * batch["chosen"].numel()
