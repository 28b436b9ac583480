"""Qwen-Image: Qwen2.5-VL text encoder, latents packed in 2x2 patches, classifier-free guidance, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion import qwen_denoiser
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

TOKENS = 512
"""Number of tokens to which the pipeline truncates a prompt when it generates."""


class QwenImage(DiffusionPolicy):
    """Policy of `QwenImagePipeline`. Source: Wu et al. 2025 (2508.02324)."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packs_latents = True
    lora_targets = qwen_denoiser.TARGETS
    kohya_prefix = "lora_unet"
    patch = 2
    cuts_prompts = True
    vae_is_video = True

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Use guidance against an empty prompt, as the model's card does."""
        arguments = super().sampling_kwargs(prompts, guidance)
        return {
            **arguments,
            "guidance_scale": None,
            "true_cfg_scale": guidance,
            "negative_prompt": [" "] * len(prompts),
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width), and a mask of the prompt's tokens."""
        embeds, mask = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=TOKENS)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
        padding = TOKENS - embeds.shape[1]
        return {
            "embeds": nn.functional.pad(embeds, (0, 0, 0, padding)).cpu(),
            "mask": nn.functional.pad(mask, (0, padding)).cpu(),
        }

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return qwen_denoiser.predict_velocity(denoiser, latents, timestep, prompt)
