"""PixArt-Sigma: T5 text encoder, epsilon prediction. The learned sigma in the denoiser's output is ignored.

diffusers has no LoRA files for this pipeline. The adapter is saved in PEFT's format, as in PixArt's own scripts, and
`PeftModel.from_pretrained(pipe.transformer, folder)` loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class PixArtSigma(DiffusionPolicy):
    """Policy of `PixArtSigmaPipeline`. Source: Chen et al. 2024 (2403.04692)."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 2

    def __init__(self, pipe: Any, source: str) -> None:
        """Add diffusers' adapter mixin to the transformer, whose class lacks it."""
        from diffusers.loaders import PeftAdapterMixin

        transformer_class = type(pipe.transformer)
        pipe.transformer.__class__ = type(transformer_class.__name__, (transformer_class, PeftAdapterMixin), {})
        super().__init__(pipe, source)

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Generate at the policy's resolution. The pipeline's bins contain only its native sizes."""
        return {**super().sampling_kwargs(prompts, guidance), "use_resolution_binning": False}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of T5, (prompts, tokens, width), and a mask. Prompts are cleaned as in the pipeline's call."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, clean_caption=True
        )
        return {"embeds": embeds.cpu(), "mask": mask.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        prediction = denoiser(
            latents,
            encoder_hidden_states=prompt["embeds"],
            encoder_attention_mask=prompt["mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]
