"""InstructPix2Pix: image editing by a Stable Diffusion UNet whose input has the latents of the image to edit as further channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.models.model_loading import load_pipeline
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.latents import LatentScale


class InstructPix2Pix(DiffusionPolicy):
    """Policy of `StableDiffusionInstructPix2PixPipeline`, without its safety checker. Source: Brooks et al. 2023 (2211.09800).

    Rows have the image to edit as `image_source`. It is resized and cropped in the same way as chosen and rejected.
    """

    required_components = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_prefix = "lora_unet"
    is_image_editing = True
    image_guidance: ClassVar[float] = 1.5
    """Guidance towards the image to edit when it generates, the pipeline's default. It is off if guidance_scale is at most 1."""

    @classmethod
    def open(cls, source: str, **options: Any) -> Any:
        """Load the pipeline without its safety checker."""
        from diffusers import StableDiffusionInstructPix2PixPipeline

        not_loaded: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
        return load_pipeline(StableDiffusionInstructPix2PixPipeline, source, **options, **not_loaded)

    def latent_channels(self) -> int:
        """Return the channels of the UNet's output. Its input has twice as many."""
        return self.model.config.out_channels  # type: ignore[union-attr, return-value]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width)."""
        embeds = self.pipe._encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeds": embeds.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """Join the image to edit to the latents in the autoencoder's scale, as the pipeline does."""
        scale = LatentScale(*(part.to(latents) for part in self.latent_scale))
        joined = torch.cat([latents, scale.denormalise(prompt["source"])], 1)
        return denoiser(joined, timestep, encoder_hidden_states=prompt["embeds"], return_dict=False)[0]

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Resize the sources here. The pipeline generates images of their size."""
        return {
            "prompt": prompts,
            "image": [self.resize_and_crop(images[0]) for images in sources],
            "guidance_scale": guidance,
            "image_guidance_scale": self.image_guidance,
        }
