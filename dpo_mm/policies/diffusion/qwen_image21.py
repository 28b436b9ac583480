"""Qwen-Image 2.1: Qwen 3 VL text encoder, latents without patches, one causal sequence of text and image, rectified flow.

Its autoencoder reads and writes four channels. The fourth is opacity, which is full for images without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class QwenImage21(DiffusionPolicy):
    """Policy of `QwenImage21Pipeline`, without images to edit. Source: Qwen-Image team 2026."""

    required_components = ("vae", "text_encoder", "processor", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 2
    vae_is_video = True
    one_prompt_per_call = True

    def native_resolution(self) -> int:
        """Return 1024, the default of the pipeline's call. The pipeline stores no size."""
        return 1024

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Return the number of latent pixels. Patches are only needed to place an image in the text's sequence."""
        return shape[-2] * shape[-1]

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an image to the autoencoder's input, (4, height, width) of the target size, in [-1, 1], fully opaque."""
        colours = super().pixels(image)
        return torch.cat([colours, torch.ones_like(colours[:1])])

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Guide only with a scale above 1, against an empty prompt. The model is meant to be sampled without guidance."""
        arguments = super().sampling_kwargs(prompts, guidance)
        del arguments["guidance_scale"]
        guided = {"negative_prompt": [" "] * len(prompts)} if guidance > 1 else {}
        return {**arguments, "true_cfg_scale": guidance, **guided}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width), and a mask of the prompt's tokens.

        Prompts are not truncated. So each is as long as the longest of its batch, and `collate` fills up the others.
        """
        embeds, mask, _ = self.pipe.encode_prompt(list(prompts), device=self.device)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
        return {"embeds": embeds.cpu(), "mask": mask.long().cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """Call the denoiser on one image at a time, because the position of an image follows the length of its prompt.

        So its result is independent of the batch. With sharded weights, the number of calls must be the same everywhere.
        """
        height, width = latents.shape[-2:]
        velocities = []
        for noisy, time, embeds, mask in zip(latents, timestep, prompt["embeds"], prompt["mask"].bool(), strict=True):
            text = embeds[mask]
            # Each slot of the text's sequence that is an image holds 2x2 latent pixels.
            slots = [torch.zeros(len(text)), torch.ones(height * width // 4)]
            velocity = denoiser(
                hidden_states=noisy.flatten(1).T[None],
                timestep=time[None] / 1000,
                encoder_hidden_states=text[None],
                img_shapes=[[(1, height, width)]],
                img_mask=torch.cat(slots).bool()[None].to(latents.device),
                return_dict=False,
            )[0]
            velocities.append(velocity[0, -height * width :].T.unflatten(1, (height, width)))
        return torch.stack(velocities)
