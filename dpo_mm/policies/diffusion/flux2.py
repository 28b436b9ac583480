"""FLUX.2 klein: three layers of Qwen 3 read the prompt, latents are 2x2 patches normalised as one, flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.latents import LatentScale


class Flux2Klein(DiffusionPolicy):
    """`Flux2KleinPipeline`. Source: Black Forest Labs 2025, FLUX.2."""

    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    )  # fmt: skip
    patch = 2

    def __init__(self, pipe: Any, source: str) -> None:
        super().__init__(pipe, source)
        # The autoencoder's batch norm says what 2x2 patches of latents are moved and scaled by.
        norm = pipe.vae.bn
        spread = torch.sqrt(norm.running_var.float().cpu() + pipe.vae.config.batch_norm_eps)
        self.latent_scale = LatentScale(norm.running_mean.float().cpu()[:, None, None], 1 / spread[:, None, None])

    def latent_channels(self) -> int:
        """Of the autoencoder's latents, four of which are one of the network's."""
        return self.pipe.transformer.config.in_channels // 4

    def tokens(self, shape: tuple[int, ...]) -> int:
        """Latents are patches already, (..., h / 2, w / 2)."""
        return shape[-2] * shape[-1]

    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Posterior of each 2x2 patch of the autoencoder's latents, (images, 4c, h / 2, w / 2)."""
        mean, std = super().encode_images(images)
        return nn.functional.pixel_unshuffle(mean, 2), nn.functional.pixel_unshuffle(std, 2)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of three layers of the text encoder side by side, (prompts, tokens, width)."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device)
        return {"embeds": embeds.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        height, width = latents.shape[2:]
        one, told = torch.arange(1), prompt["embeds"]
        places = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one).to(latents.device)
        order = torch.cartesian_prod(one, one, one, torch.arange(told.shape[1])).to(latents.device)
        velocity = denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=None,
            encoder_hidden_states=told,
            txt_ids=order,
            img_ids=places,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (height, width))
