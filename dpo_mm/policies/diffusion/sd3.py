"""Stable Diffusion 3 and 3.5: two CLIP encoders and an optional T5, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.models.model_loading import load_pipeline
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""Components that a pipeline folder may lack."""


class StableDiffusion3(DiffusionPolicy):
    """Policy of `StableDiffusion3Pipeline`.

    T5 encodes 256 tokens, the pipeline's default length. Without T5 their hidden states are zeros.
    """

    required_components = (
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "scheduler",
    )
    denoiser = "transformer"
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    kohya_prefix = "lora_transformer"
    patch = 2

    @classmethod
    def open(cls, source: str, **options: Any) -> Any:
        """Load the pipeline, without T5 if the folder does not contain it."""
        from diffusers import StableDiffusion3Pipeline

        folder = Path(source)
        missing = [part for part in OPTIONAL if folder.is_dir() and not (folder / part).is_dir()]
        not_loaded: dict[str, Any] = dict.fromkeys(missing)
        return load_pipeline(StableDiffusion3Pipeline, source, **options, **not_loaded)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of CLIP, then of T5, (prompts, tokens, width), and CLIP's pooled states, (prompts, width)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return denoiser(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=prompt["embeds"],
            pooled_projections=prompt["pooled"],
            return_dict=False,
        )[0]
