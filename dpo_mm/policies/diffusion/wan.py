"""Wan 2.1: video from text. UMT5 text encoder, a video autoencoder, classifier-free guidance, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.data.clips import clip_frames
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.latents import LatentScale, posterior

TOKENS = 512
"""Number of tokens to which the pipeline pads or truncates a prompt."""


class Wan(DiffusionPolicy):
    """Policy of `WanPipeline` with one denoiser, as Wan 2.1. Source: Wan team 2025 (2503.20314).

    Latents are (clips, channels, frames, height, width). Clips have the number of frames of the pipeline's default, 81, and are square.
    """

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 2
    frames = 81

    def __init__(self, pipe: Any, source: str) -> None:
        if pipe.transformer is None or pipe.transformer_2 is not None or pipe.config.expand_timesteps:
            raise ValueError(
                f"model {source!r}: two denoisers, or a timestep per token, as in Wan 2.2, are not supported. Use Wan 2.1"
            )
        pipe.vae_scale_factor = pipe.vae_scale_factor_spatial  # the name in pipelines of images
        super().__init__(pipe, source)
        self.latent_scale = LatentScale(*(part[..., None] for part in self.latent_scale))

    def native_resolution(self) -> int:
        """Return the height of the pipeline's default, 480 pixels. Its default width is 832."""
        return 480

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Return the number of 1x2x2 patches of latents, (..., frames, height, width)."""
        return shape[-3] * super().num_tokens(shape)

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert a clip to the autoencoder's input, (3, frames, height, width) of the target size, in [-1, 1]."""
        to_pixels = super().pixels
        return torch.stack([to_pixels(frame) for frame in clip_frames(image, self.frames)], 1)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of clips, (clips, channels, frames, height, width), float32, on the CPU."""
        pixels = torch.stack([self.pixels(image) for image in images])
        mean, std = posterior(self.vae, pixels.to(self.device))
        return mean.float().cpu(), std.float().cpu()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width). Padding is zero."""
        how: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": TOKENS}
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device, **how)
        return {"embeds": embeds.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return denoiser(latents, timestep, encoder_hidden_states=prompt["embeds"], return_dict=False)[0]

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Guide against an empty prompt."""
        own = {"num_frames": self.frames, "output_type": "pil", "max_sequence_length": TOKENS}
        return super().sampling_kwargs(prompts, guidance) | own
