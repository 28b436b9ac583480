"""Chroma: FLUX.1 without CLIP and without embedded guidance. The denoiser gets a mask of T5's padding, except its first token.

diffusers adds this mask to the logits of attention. So padding has a lower weight than text, by a factor e, instead of none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.policies.diffusion import flux_denoiser
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

SINGLE_BLOCK = "ChromaSingleTransformerBlock"
"""Class of the blocks that diffusers calls without a mask if it checkpoints gradients."""


class Chroma(DiffusionPolicy):
    """Policy of `ChromaPipeline`. Source: Rock 2025, Chroma1."""

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packs_latents = True
    lora_targets = flux_denoiser.TARGETS
    patch = 2

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of T5, (prompts, tokens, width), and the denoiser's mask, in the type of the hidden states."""
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds.cpu(), "mask": mask.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        tokens, ids = flux_denoiser.pack_latents(self, latents, kind=0)
        # As in the pipeline, the mask has numbers, 1 and 0.
        mask = torch.cat([prompt["mask"], prompt["mask"].new_ones(tokens.shape[:2])], dim=1)
        network: Any = self.model
        if network.gradient_checkpointing:
            network._gradient_checkpointing_func = checkpoint_with_mask(mask)
        velocity = denoiser(
            hidden_states=tokens,
            timestep=timestep / 1000,
            encoder_hidden_states=prompt["embeds"],
            txt_ids=latents.new_zeros(prompt["embeds"].shape[1], 3),
            img_ids=ids,
            attention_mask=mask,
            return_dict=False,
        )[0]
        return flux_denoiser.unpack_latents(self, velocity, latents.shape)


def checkpoint_with_mask(mask: Tensor) -> Callable[..., Any]:
    """Return a function that checkpoints a block, and gives this mask to the blocks that diffusers calls without it.

    Args:
        mask: of text and image tokens, (images, tokens).
    """
    from torch.utils.checkpoint import checkpoint

    def run_block(block: nn.Module, *arguments: Any) -> Any:
        given = (*arguments, mask) if type(block).__name__ == SINGLE_BLOCK else arguments
        return checkpoint(block, *given, use_reentrant=False)

    return run_block
