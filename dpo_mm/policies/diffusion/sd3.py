"""Stable Diffusion 3 and 3.5: a flow, two CLIP encoders and a T5, which may be left out as the pipeline allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.model_loading import load_pipeline
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

OPTIONAL = ("text_encoder_3", "tokenizer_3")


class StableDiffusion3(DiffusionPolicy):
    """`StableDiffusion3Pipeline`. T5 reads 256 tokens, the pipeline's own length; without it they are zeros."""

    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
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
    def open(cls, source: str, *, revision: str | None, dtype: torch.dtype) -> Any:
        from diffusers import StableDiffusion3Pipeline

        folder = Path(source)
        left_out = [part for part in OPTIONAL if folder.is_dir() and not (folder / part).is_dir()]
        unused: dict[str, Any] = dict.fromkeys(left_out)
        return load_pipeline(StableDiffusion3Pipeline, source, revision=revision, dtype=dtype, **unused)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of CLIP, then of T5, (prompts, tokens, width); both CLIPs' pooled, (prompts, width)."""
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
