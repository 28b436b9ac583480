"""LongCat-Image: Qwen2.5-VL text encoder, tokens of FLUX.1's latents behind the text's positions, rectified flow.

diffusers has no LoRA files for this pipeline. The adapter is saved in PEFT's format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.models.model_loading import load_pipeline
from dpo_mm.policies.diffusion import flux_denoiser
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class LongCatImage(DiffusionPolicy):
    """Policy of `LongCatImagePipeline`. Source: LongCat team 2025 (2512.07584)."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packs_latents = True
    lora_targets = flux_denoiser.TARGETS
    patch = 2

    @classmethod
    def open(cls, source: str, **options: Any) -> Any:
        """Load the pipeline without the processor of the text encoder, which only rewrites prompts."""
        from diffusers import LongCatImagePipeline

        return load_pipeline(LongCatImagePipeline, source, **options, text_processor=None)

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Generate what the prompt says, not what the text encoder rewrites it to."""
        arguments = super().sampling_kwargs(prompts, guidance)
        return {**arguments, "negative_prompt": [""] * len(prompts), "enable_prompt_rewrite": False}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, 512, width), which the denoiser reads without a mask."""
        # The pipeline's device is that of its first module, which may not be that of the text encoder.
        handle = self.pipe.text_encoder.register_forward_pre_hook(_move_to_module, with_kwargs=True)
        try:
            embeds, _ = self.pipe.encode_prompt(list(prompts))
        finally:
            handle.remove()
        return {"embeds": embeds.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

        height, width = latents.shape[-2:]
        longest = self.pipe.tokenizer_max_length
        with latents.device:  # a copy from the host would wait for the GPU
            text_ids = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=prompt["embeds"].shape[1])
            image_ids = prepare_pos_ids(
                modality_id=1, type="image", start=(longest, longest), height=height // 2, width=width // 2
            )
        velocity = denoiser(
            hidden_states=self.pipe._pack_latents(latents.contiguous(), *latents.shape),
            timestep=timestep / 1000,
            guidance=None,
            encoder_hidden_states=prompt["embeds"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return flux_denoiser.unpack_latents(self, velocity, latents.shape)


def _move_to_module(module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, Any]:
    """Move the keyword arguments of a call that are tensors to the module's device."""
    return arguments, {k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
