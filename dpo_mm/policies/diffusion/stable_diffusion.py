"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, epsilon or v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.models.model_loading import load_pipeline
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.text_encoder_lora import token_ids


class StableDiffusion(DiffusionPolicy):
    """Policy of `StableDiffusionPipeline`. The safety checker is not loaded, because it would blacken images."""

    required_components = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoders = ("text_encoder",)
    kohya_prefix = "lora_unet"

    @classmethod
    def open(cls, source: str, **options: Any) -> Any:
        """Load the pipeline without its safety checker."""
        from diffusers import StableDiffusionPipeline

        not_loaded: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
        return load_pipeline(StableDiffusionPipeline, source, **options, **not_loaded)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width)."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeds": embeds.cpu()}

    def tokenize(self, prompts: Sequence[str]) -> Prompt:
        return {"ids": token_ids(self.pipe.tokenizer, prompts)}

    def embed(self, tokens: Prompt) -> Prompt:
        return {"embeds": self.pipe.text_encoder(tokens["ids"])[0]}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return denoiser(latents, timestep, encoder_hidden_states=prompt["embeds"], return_dict=False)[0]
