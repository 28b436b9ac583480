"""Scaling of an autoencoder's latents for the denoiser, and encoding pixels to a posterior."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LatentScale(NamedTuple):
    """Shift and scale between the autoencoder's latents and the denoiser's: normalised = (raw - shift) * scale."""

    shift: Tensor
    """(channels, 1, 1) or (1, 1, 1), float32."""
    scale: Tensor
    """(channels, 1, 1) or (1, 1, 1), float32."""

    def normalise(self, raw: Tensor) -> Tensor:
        """Convert the autoencoder's latents to the denoiser's, (..., channels, height, width)."""
        return (raw - self.shift) * self.scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Convert the denoiser's latents to the autoencoder's, (..., channels, height, width)."""
        return latents / self.scale + self.shift


def latent_scale(config: Any) -> LatentScale:
    """Read the latent scale from an autoencoder's config.

    Args:
        config: an autoencoder's config. It may have `scaling_factor`, and `shift_factor` or both `latents_mean` and
            `latents_std`.
    """

    def column(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)

    factor = column(config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return LatentScale(column(config.latents_mean), factor / column(config.latents_std))
    return LatentScale(column(config.get("shift_factor") or 0.0), factor)


def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pixels with an autoencoder.

    An autoencoder that overflows in float16 (`force_upcast`, as SDXL's) encodes in float32, as the diffusers pipeline
    decodes. An autoencoder without a posterior (AutoencoderTiny, AutoencoderDC) has a standard deviation of 0.

    Args:
        vae: a diffusers autoencoder.
        pixels: (images, 3, height, width) in [-1, 1], or (images, 3, 1, height, width) for a video autoencoder.

    Returns:
        Mean and standard deviation of the posterior, in the shape of the latents.
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
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents, torch.zeros_like(latents)


def image_posterior(vae: Any, pixels: Tensor, *, as_video: bool) -> tuple[Tensor, Tensor]:
    """Encode images as `posterior`, through a video autoencoder as videos of one frame. The result is float32, on the CPU."""
    mean, std = posterior(vae, pixels[:, :, None] if as_video else pixels)
    if as_video:
        mean, std = mean.squeeze(2), std.squeeze(2)
    return mean.float().cpu(), std.float().cpu()
