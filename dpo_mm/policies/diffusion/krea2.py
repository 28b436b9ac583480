"""Krea 2: hidden states of many layers of a Qwen 3 VL text encoder, the autoencoder of Qwen-Image, rectified flow.

Train Raw, the base. Turbo, its distillation to eight steps, takes the same adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt
from dpo_mm.policies.diffusion.text_states import pad_states


class Krea2(DiffusionPolicy):
    """Policy of `Krea2Pipeline`. Source: Krea 2026, Krea 2 technical report.

    Guidance follows the pipeline: 0 is off, and g is the usual scale of 1 + g.
    """

    required_components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packs_latents = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_gate")
    patch = 2
    cuts_prompts = True
    vae_is_video = True

    def native_resolution(self) -> int:
        """Return 1024, the default of the pipeline's call. The pipeline stores no size."""
        return 1024

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of the text encoder's layers, (prompts, tokens, layers, width), and a mask, without padding.

        All text has one position in the denoiser, and padding is never read. So leaving it out changes nothing.
        """
        embeds, masks = self.pipe.encode_prompt(list(prompts), device=self.device)
        return pad_states([states[mask] for states, mask in zip(embeds, masks, strict=True)])

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        height, width = latents.shape[-2:]
        longest = prompt["embeds"].shape[1]
        velocity = denoiser(
            hidden_states=self.pipe._pack_latents(latents.contiguous(), *latents.shape),
            encoder_hidden_states=prompt["embeds"],
            timestep=timestep / self.scheduler.config.num_train_timesteps,
            position_ids=self.pipe.prepare_position_ids(longest, height // 2, width // 2, latents.device),
            encoder_attention_mask=prompt["mask"].bool(),
            return_dict=False,
        )[0]
        factor = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, height * factor, width * factor).squeeze(2)
