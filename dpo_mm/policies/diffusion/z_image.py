"""Z-Image: Qwen 3 reads the prompt; the network's time runs from noise (0) to picture (1) and its velocity with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

TOKENS = 512
"""Of a prompt, as the pipeline cuts it."""


class ZImage(DiffusionPolicy):
    """`ZImagePipeline`. Source: Z-Image team 2025 (2511.22699)."""

    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 2

    def native_resolution(self) -> int:
        """What the pipeline draws: it keeps no size, and takes 1024 where it is told none."""
        return 1024

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder, (prompts, tokens, width), and which tokens are the prompt's."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        mask = torch.arange(TOKENS) < torch.tensor([len(one) for one in embeds])[:, None]
        padded = [nn.functional.pad(one, (0, 0, 0, TOKENS - len(one))) for one in embeds]
        return {"embeds": torch.stack(padded).cpu(), "mask": mask.long()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        told = [embeds[mask.bool()] for embeds, mask in zip(prompt["embeds"], prompt["mask"], strict=True)]
        films = list(latents[:, :, None].unbind(0))
        velocity = denoiser(films, (1000 - timestep) / 1000, told, return_dict=False)[0]
        return -torch.stack(velocity).squeeze(2)
