"""Stable Diffusion XL: two text encoders, their pooled embedding, and a UNet that is told sizes and crops.

Each picture is told its own size and crop where the rows have them, as in SDXL's training (Podell et al. 2023, 2307.01952,
2.2); without them all are told the size that they have, uncropped, which is what the pipeline says when it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class StableDiffusionXL(DiffusionPolicy):
    """`StableDiffusionXLPipeline`."""

    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_prefix = "lora_unet"
    conditioning_columns = ("frame",)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of both encoders side by side (prompts, tokens, width), the second's pooled (prompts, width)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def size_conditioning(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """frame: height and width of the picture, top and left of its crop, height and width trained at, (images, 6)."""
        return {"frame": torch.tensor([self._frame(image) for image in images], dtype=torch.float32)}

    def _frame(self, image: Image.Image) -> list[float]:
        _, (left, top, right, bottom) = self.crop_box(image.size)
        return [image.height, image.width, top, left, bottom - top, right - left]

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        height, width = (self.pipe.vae_scale_factor * side for side in latents.shape[-2:])
        whole = torch.tensor([height, width, 0.0, 0.0, height, width], device=latents.device)
        told: dict[str, Any] = {
            "text_embeds": prompt["pooled"],
            "time_ids": prompt.get("frame", whole.expand(len(latents), -1)),
        }
        return denoiser(
            latents,
            timestep,
            encoder_hidden_states=prompt["embeds"],
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
