"""Latents as a denoiser takes them: an autoencoder's own, moved and scaled as its config says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LatentScale(NamedTuple):
    """normalised = (raw - shift) * scale; both (c, 1, 1) or (1, 1, 1), float32."""

    shift: Tensor
    scale: Tensor

    def normalised(self, raw: Tensor) -> Tensor:
        """An autoencoder's latents as the denoiser takes them, (..., c, h, w)."""
        return (raw - self.shift) * self.scale

    def unnormalised(self, latents: Tensor) -> Tensor:
        """The denoiser's latents as the autoencoder decodes them, (..., c, h, w)."""
        return latents / self.scale + self.shift


def latent_scale(config: Any) -> LatentScale:
    """The scale of an autoencoder by its config: scaling_factor, and shift_factor or latents_mean and latents_std."""

    def column(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)

    factor = column(config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return LatentScale(column(config.latents_mean), factor / column(config.latents_std))
    return LatentScale(column(config.get("shift_factor") or 0.0), factor)


def posterior(encoded: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what an autoencoder's `encode` gave, each of the latents' shape.

    An autoencoder without a posterior (AutoencoderTiny, AutoencoderDC) has a standard deviation of 0.
    """
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    plain = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return plain, torch.zeros_like(plain)
