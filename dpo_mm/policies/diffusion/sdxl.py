"""Stable Diffusion XL: two text encoders and a UNet that is conditioned on image size and crop.

If the rows have sizes, each image is conditioned on its own size and crop, as in SDXL's training (Podell et al. 2023,
2307.01952, section 2.2). Otherwise all are conditioned on their present size without a crop, as in the pipeline's call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.text_encoder_lora import token_ids
from dpo_mm.policies.kohya_names import sdxl_module


class StableDiffusionXL(DiffusionPolicy):
    """Policy of `StableDiffusionXLPipeline`. Source: Podell et al. 2023 (2307.01952)."""

    required_components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoders = ("text_encoder", "text_encoder_2")
    kohya_prefix = "lora_unet"
    conditioning_columns = ("frame",)

    def kohya_module(self, name: str) -> str:
        """Return a UNet module's name in kohya's files, which number the blocks as the original model does."""
        return sdxl_module(name, self.model.config)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Joined hidden states of both encoders, (prompts, tokens, width), and a pooled state, (prompts, width)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def tokenize(self, prompts: Sequence[str]) -> Prompt:
        return {"ids": token_ids(self.pipe.tokenizer, prompts), "ids_2": token_ids(self.pipe.tokenizer_2, prompts)}

    def embed(self, tokens: Prompt) -> Prompt:
        first, second = (
            encoder(tokens[name], output_hidden_states=True)
            for encoder, name in ((self.pipe.text_encoder, "ids"), (self.pipe.text_encoder_2, "ids_2"))
        )
        return {"embeds": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), "pooled": second[0]}

    def size_conditioning(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Compute the column `frame`, (images, 6), in pixels.

        It contains height and width of the image, top and left of its crop, and height and width after the crop.
        """
        return {"frame": torch.tensor([self._size_and_crop(image) for image in images], dtype=torch.float32)}

    def _size_and_crop(self, image: Image.Image) -> list[float]:
        _, (left, top, right, bottom) = self.crop_box(image.size)
        return [image.height, image.width, top, left, bottom - top, right - left]

    def _uncropped(self, latents: Tensor) -> Tensor:
        """Return the column `frame` of images that have these latents and no crop."""
        height, width = (float(self.pipe.vae_scale_factor * edge) for edge in latents.shape[-2:])
        frame = [height, width, 0.0, 0.0, height, width]
        columns = [torch.full((len(latents),), value, device=latents.device) for value in frame]
        return torch.stack(columns, 1)

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        frame = prompt["frame"] if "frame" in prompt else self._uncropped(latents)
        conditioning: dict[str, Any] = {"text_embeds": prompt["pooled"], "time_ids": frame}
        return denoiser(
            latents,
            timestep,
            encoder_hidden_states=prompt["embeds"],
            added_cond_kwargs=conditioning,
            return_dict=False,
        )[0]
