"""FLUX.1: rectified flow on latents packed in 2x2 patches, with position ids and, in dev, embedded guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion import flux_denoiser
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class Flux(DiffusionPolicy):
    """Policy of `FluxPipeline`: dev, whose denoiser is conditioned on a guidance scale, and schnell, without it."""

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
    packs_latents = True
    lora_targets = flux_denoiser.TARGETS
    kohya_prefix = "lora_transformer"
    patch = 2
    guidance: ClassVar[float] = 3.5
    """Guidance on which dev is conditioned in training, the pipeline's default, as in diffusers' FLUX scripts."""

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of T5, (prompts, tokens, width), and CLIP's pooled state, (prompts, width)."""
        return flux_denoiser.encode_prompts(self, prompts)

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return flux_denoiser.predict_velocity(self, denoiser, latents, timestep, prompt, guidance=self.guidance)

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        return {
            **super().sampling_kwargs(prompts, guidance),
            "max_sequence_length": flux_denoiser.max_prompt_tokens(self),
        }
