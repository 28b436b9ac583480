"""ERNIE-Image: hidden states of a Mistral 3 text encoder, latents of FLUX.2 in patches, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.models.model_loading import load_pipeline
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.patched_latents import batch_norm_scale, patchify
from dpo_mm.policies.diffusion.text_states import pad_states

EPS = 1e-5
"""What the pipeline adds to the variance of latents. The published config of the autoencoder has another value."""


class ErnieImage(DiffusionPolicy):
    """Policy of `ErnieImagePipeline`, without its model that rewrites prompts. Source: Baidu 2026, ERNIE-Image."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    cuts_prompts = True

    def __init__(self, pipe: Any, source: str) -> None:
        super().__init__(pipe, source)
        self.latent_scale = batch_norm_scale(pipe.vae, eps=EPS)

    @classmethod
    def open(cls, source: str, **options: Any) -> Any:
        """Load the pipeline without the model that rewrites prompts (pe)."""
        from diffusers import ErnieImagePipeline

        return load_pipeline(ErnieImagePipeline, source, **options, pe=None, pe_tokenizer=None)

    def native_resolution(self) -> int:
        """Return 1024, the default of the pipeline's call. The pipeline stores no size."""
        return 1024

    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each 2x2 patch of latents, (images, 4c, h / 2, w / 2), float32, on the CPU."""
        return patchify(super().encode_images(images))

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Generate what the prompt says, not what a model rewrites it to."""
        return {**super().sampling_kwargs(prompts, guidance), "use_pe": False}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the last but one layer, (prompts, tokens, width), and a mask of the prompt's tokens."""
        return pad_states(self.pipe.encode_prompt(list(prompts), device=self.device))

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return denoiser(
            hidden_states=latents,
            timestep=timestep.to(latents.dtype),
            text_bth=prompt["embeds"],
            text_lens=prompt["mask"].sum(1),
            return_dict=False,
        )[0]
