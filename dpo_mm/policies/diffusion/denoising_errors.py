"""Denoising errors of a batch, and the surrogate log-probs that they give.

Source: Wallace et al. 2023 (2311.12908), eq. 14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dpo_mm.objectives import LogProbs
from dpo_mm.policies.diffusion.text_encoder_lora import batch_prompts
from dpo_mm.policies.protocol import Batch

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


class DenoisingErrors(NamedTuple):
    """Denoising errors of the images of a batch."""

    mean: Tensor
    """Mean squared error per image, (images,), float32."""
    residual: Tensor
    """Prediction minus target, (images, channels, height, width), float32, without gradient."""


def pair_errors(policy: DiffusionPolicy, model: nn.Module, batch: Batch) -> DenoisingErrors:
    """Compute the denoising errors of the chosen images, then of the rejected ones if there are any, (2 * pairs,)."""
    sides = [side for side in ("chosen", "rejected") if side in batch]
    latents = torch.cat([batch[side] for side in sides])
    noise, timestep = torch.cat([batch["noise"]] * len(sides)), batch["timestep"].repeat(len(sides))
    prompts = batch_prompts(policy, batch)[: len(sides)]
    prompt = {name: torch.cat([each[name] for each in prompts]) for name in prompts[0]}
    for name in policy.conditioning_columns:
        if f"chosen_{name}" in batch:
            prompt[name] = torch.cat([batch[f"{side}_{name}"] for side in sides])
    return policy.denoising_errors(model, latents, noise, timestep, prompt)


def surrogate_log_probs(errors: DenoisingErrors, *, pairs: int) -> LogProbs:
    """Return -1/2 of the mean errors of chosen and rejected.

    Args:
        errors: of the chosen images, then of the rejected ones, (2 * pairs,), or of the chosen images only, (pairs,).
        pairs: number of chosen images.
    """
    chosen, rejected = (-0.5 * errors.mean).split([pairs, len(errors.mean) - pairs])
    return LogProbs(chosen, rejected, torch.ones_like(chosen), torch.ones_like(rejected), is_likelihood=False)
