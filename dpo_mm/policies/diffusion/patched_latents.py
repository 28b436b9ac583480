"""Latents in 2x2 patches that are normalised together, as in FLUX.2 and ERNIE-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.policies.diffusion.latents import LatentScale


def batch_norm_scale(vae: Any, *, eps: float) -> LatentScale:
    """Return shift and scale of patches: the statistics of the autoencoder's batch norm.

    Args:
        vae: an autoencoder of FLUX.2.
        eps: what the pipeline adds to the variance.
    """
    norm = vae.bn
    std = torch.sqrt(norm.running_var.float().cpu() + eps)
    return LatentScale(norm.running_mean.float().cpu()[:, None, None], 1 / std[:, None, None])


def patchify(encoded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Convert mean and standard deviation, (images, c, h, w), to those of 2x2 patches, (images, 4c, h / 2, w / 2)."""
    mean, std = encoded
    return nn.functional.pixel_unshuffle(mean, 2), nn.functional.pixel_unshuffle(std, 2)
