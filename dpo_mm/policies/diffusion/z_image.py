"""Z-Image: Qwen 3 text encoder, and a denoiser whose time and velocity run from noise (0) to image (1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

TOKENS = 512
"""Number of tokens to which the pipeline truncates a prompt."""


class ZImage(DiffusionPolicy):
    """Policy of `ZImagePipeline`. Source: Z-Image team 2025 (2511.22699)."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 2

    def native_resolution(self) -> int:
        """Return 1024, the default of the pipeline's call. The pipeline stores no size."""
        return 1024

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width), and a mask of the prompt's tokens."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        mask = torch.arange(TOKENS) < torch.tensor([len(states) for states in embeds])[:, None]
        padded = [nn.functional.pad(states, (0, 0, 0, TOKENS - len(states))) for states in embeds]
        return {"embeds": torch.stack(padded).cpu(), "mask": mask.long()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        embeds = [states[mask.bool()] for states, mask in zip(prompt["embeds"], prompt["mask"], strict=True)]
        videos = list(latents[:, :, None].unbind(0))
        velocity = denoiser(videos, (1000 - timestep) / 1000, embeds, return_dict=False)[0]
        return -torch.stack(velocity).squeeze(2)
