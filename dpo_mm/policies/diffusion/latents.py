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


def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that an autoencoder encodes pixels to, each of the latents' shape.

    One that overflows in float16 (force_upcast: SDXL's) encodes in float32, as the stock pipeline decodes with it. One
    without a posterior (AutoencoderTiny, AutoencoderDC) has a standard deviation of 0.
    """
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        encoded = vae.encode(pixels.to(vae.dtype))
    finally:
        if upcast:
            vae.to(torch.float16)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    plain = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return plain, torch.zeros_like(plain)
