"""FLUX.2 dev and klein: three layers of a Mistral 3 or Qwen 3 text encoder, latents in patches that are normalised together, flow.

They generate from text alone, or edit one or several images. Their tokens follow those of the latents, each image at another time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.patched_latents import batch_norm_scale, patchify
from dpo_mm.policies.diffusion.prompt_sources import source_latents

SOURCE_TIME = 10
"""Time coordinate of the tokens of the first image to edit, and step to that of the next, as in the pipeline."""


class Flux2(DiffusionPolicy):
    """Policy of `Flux2Pipeline`, whose denoiser is conditioned on a guidance scale, and of `Flux2KleinPipeline`, without it.

    If rows have images to edit as `image_source`, they are resized and cropped in the same way as chosen and rejected.
    Source: Black Forest Labs 2025, FLUX.2.
    """

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packs_latents = True
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    )  # fmt: skip
    patch = 2
    edits_optionally = True
    takes_several_sources = True
    guidance: ClassVar[float] = 4.0
    """Guidance on which dev is conditioned in training, the pipeline's default."""

    def __init__(self, pipe: Any, source: str) -> None:
        super().__init__(pipe, source)
        self.latent_scale = batch_norm_scale(pipe.vae, eps=pipe.vae.config.batch_norm_eps)

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Return the number of latent pixels, because these latents are patches already, (..., h / 2, w / 2)."""
        return shape[-2] * shape[-1]

    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each 2x2 patch of latents, (images, 4c, h / 2, w / 2), float32, on the CPU."""
        return patchify(super().encode_images(images))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Joined hidden states of three layers of the text encoder, (prompts, tokens, width)."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device)
        return {"embeds": embeds.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        count, _, height, width = latents.shape
        images, embeds = [latents, *source_latents(prompt)], prompt["embeds"]
        with latents.device:  # a copy from the host would wait for the GPU
            zero = torch.arange(1)
            grid = (torch.arange(height), torch.arange(width), zero)
            times = [torch.full((1,), SOURCE_TIME * n) for n in range(len(images))]
            image_ids = torch.cat([torch.cartesian_prod(time, *grid) for time in times])
            text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(embeds.shape[1]))
        tokens = torch.cat(images, 2)
        takes_guidance = self.pipe.transformer.config.guidance_embeds
        velocity = denoiser(
            hidden_states=tokens.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=torch.full((count,), self.guidance, device=latents.device) if takes_guidance else None,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Resize the sources here. The pipeline gives all images to each prompt, so it gets one prompt at a time."""
        arguments = super().sampling_kwargs(prompts, guidance)
        images = [self.resize_and_crop(image) for each in sources for image in each]
        return {**arguments, "image": images} if images else arguments
