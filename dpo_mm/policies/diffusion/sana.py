"""Sana: Gemma 2 text encoder with an instruction, an autoencoder without posterior, rectified flow."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class Sana(DiffusionPolicy):
    """Policy of `SanaPipeline`. Source: Xie et al. 2024 (2410.10629)."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: Any, source: str) -> None:
        super().__init__(pipe, source)
        if pipe.tokenizer is not None:
            pipe.tokenizer.padding_side = "right"  # as the pipeline sets it when it first encodes

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Generate at the policy's resolution. The pipeline's bins contain only its native sizes."""
        return {**super().sampling_kwargs(prompts, guidance), "use_resolution_binning": False}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder after the pipeline's default instruction, (prompts, tokens, width)."""
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        embeds, mask, _, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            complex_human_instruction=parameters["complex_human_instruction"].default,
        )
        return {"embeds": embeds.cpu(), "mask": mask.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return denoiser(
            latents,
            encoder_hidden_states=prompt["embeds"],
            encoder_attention_mask=prompt["mask"],
            timestep=timestep * self.pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
