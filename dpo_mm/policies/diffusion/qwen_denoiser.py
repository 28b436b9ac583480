"""LoRA targets and velocity, which Qwen-Image and Qwen-Image-Edit share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import Prompt

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Modules that a LoRA adapts by default."""


def predict_velocity(
    denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt, sources: Sequence[Tensor] = ()
) -> Tensor:
    """Compute the denoiser's velocity, (images, channels, height, width). Tokens of images to edit follow those of the latents."""
    images = [latents, *sources]
    packed = denoiser(
        hidden_states=torch.cat(
            [nn.functional.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2) for image in images], 1
        ),
        timestep=timestep / 1000,
        encoder_hidden_states=prompt["embeds"],
        encoder_hidden_states_mask=prompt["mask"].bool(),
        img_shapes=[[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * len(latents),
        return_dict=False,
    )[0]
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    patches = packed[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
    return nn.functional.pixel_shuffle(patches, 2)
