"""Qwen-Image-Edit-2509 and later: edits of one or several images, which the text encoder and the denoiser both see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion import qwen_denoiser
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.latents import image_posterior
from dpo_mm.policies.diffusion.prompt_sources import source_latents


class QwenImageEdit(DiffusionPolicy):
    """Policy of `QwenImageEditPlusPipeline`. Source: Wu et al. 2025 (2508.02324).

    Rows have the images to edit as `image_source`. They are resized and cropped in the same way as chosen and rejected. The pipeline
    then resizes them to about 1024 x 1024 pixels for the denoiser and to about 384 x 384 pixels for the text encoder.
    """

    required_components = ("vae", "text_encoder", "tokenizer", "processor", "transformer", "scheduler")
    denoiser = "transformer"
    packs_latents = True
    lora_targets = qwen_denoiser.TARGETS
    kohya_prefix = "lora_unet"
    patch = 2
    cuts_prompts = True
    vae_is_video = True
    is_image_editing = True
    takes_several_sources = True
    prompts_show_sources = True
    one_prompt_per_call = True

    @torch.no_grad()
    def encode_edit(self, prompt: str, sources: Sequence[Image.Image]) -> Prompt:
        """Hidden states of the text encoder, (1, tokens, width), and a mask of its tokens. Images are among the tokens."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as upstream

        images = [self.resize_and_crop(image) for image in sources]
        shown = []
        for image in images:
            width, height = upstream.calculate_dimensions(upstream.CONDITION_IMAGE_SIZE, image.width / image.height)
            shown.append(self.pipe.image_processor.resize(image, height, width))
        embeds, mask = self.pipe.encode_prompt(prompt=[prompt], image=shown, device=self.device)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
        return {"embeds": embeds.cpu(), "mask": mask.cpu()}

    @torch.no_grad()
    def encode_sources(self, images: Sequence[Image.Image]) -> Tensor:
        """Mean of the autoencoder's posterior at the pipeline's size for images to edit, (images, channels, h, w), on the CPU."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as upstream

        cropped = [self.resize_and_crop(image) for image in images]
        width, height = upstream.calculate_dimensions(upstream.VAE_IMAGE_SIZE, cropped[0].width / cropped[0].height)
        pixels = torch.cat([self.pipe.image_processor.preprocess(image, height, width) for image in cropped])
        return image_posterior(self.vae, pixels.to(self.device), as_video=True)[0]

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return qwen_denoiser.predict_velocity(denoiser, latents, timestep, prompt, source_latents(prompt))

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Crop the sources here. The pipeline edits one prompt at a time, with guidance against an empty prompt."""
        arguments = super().sampling_kwargs(prompts, guidance)
        images = [self.resize_and_crop(image) for each in sources for image in each]
        guided = {"guidance_scale": None, "true_cfg_scale": guidance, "negative_prompt": [" "] * len(prompts)}
        return {**arguments, **guided, "image": images, "max_sequence_length": self.pipe.tokenizer_max_length}
