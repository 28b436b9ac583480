"""FLUX.1: a flow on latents packed two by two into tokens, with ids of their places and, in dev, embedded guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
TOKENS = {True: 512, False: 256}
"""Tokens that T5 reads, by whether guidance is embedded: dev 512, schnell 256, as their model cards say."""


class Flux(DiffusionPolicy):
    """`FluxPipeline`: dev, where the denoiser is told a guidance, and schnell, where it isn't."""

    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = TARGETS
    kohya_prefix = "lora_transformer"
    patch = 2
    guidance: ClassVar[float] = 3.5
    """What dev is told in training: what the pipeline draws with, as in diffusers' own FLUX scripts."""

    def latent_channels(self) -> int:
        return channels(self)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        return encoded(self, prompts)

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return velocity(self, denoiser, latents, timestep, prompt, guidance=self.guidance)

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Image.Image] = ()
    ) -> dict[str, Any]:
        return {**super().sampling_kwargs(prompts, guidance), "max_sequence_length": text_tokens(self)}


def text_tokens(policy: DiffusionPolicy) -> int:
    return TOKENS[bool(policy.pipe.transformer.config.guidance_embeds)]


def channels(policy: DiffusionPolicy) -> int:
    """Channels of the latents before they are packed."""
    return policy.pipe.transformer.config.in_channels // 4


@torch.no_grad()
def encoded(policy: DiffusionPolicy, prompts: Sequence[str]) -> Prompt:
    """T5's hidden states (prompts, tokens, width) and CLIP's pooled embedding (prompts, width)."""
    embeds, pooled, _ = policy.pipe.encode_prompt(
        list(prompts), None, device=policy.device, max_sequence_length=text_tokens(policy)
    )
    return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}


def velocity(
    policy: DiffusionPolicy,
    denoiser: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    prompt: Prompt,
    *,
    guidance: float,
    source: Tensor | None = None,
) -> Tensor:
    """The denoiser's velocity, (images, c, h, w). source: normalised latents of a picture to edit, (images, c, h', w').

    A source's tokens stand behind the picture's own, with 1 instead of 0 in the first of their ids.
    """
    count, _, height, width = latents.shape
    tokens, ids = packed(policy, latents, kind=0)
    if source is not None:
        more, their_ids = packed(policy, source, kind=1)
        tokens, ids = torch.cat([tokens, more], dim=1), torch.cat([ids, their_ids])
    told = policy.pipe.transformer.config.guidance_embeds
    found = denoiser(
        hidden_states=tokens,
        timestep=timestep / policy.scheduler.config.num_train_timesteps,
        guidance=torch.full((count,), guidance, device=latents.device) if told else None,
        pooled_projections=prompt["pooled"],
        encoder_hidden_states=prompt["embeds"],
        txt_ids=latents.new_zeros(prompt["embeds"].shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    factor = policy.pipe.vae_scale_factor
    own = found[:, : height * width // 4]
    return policy.pipe._unpack_latents(own, height * factor, width * factor, factor)


def packed(policy: DiffusionPolicy, latents: Tensor, *, kind: int) -> tuple[Tensor, Tensor]:
    """Latents as tokens (images, h w / 4, 4 c), and the ids of their places (h w / 4, 3): kind, row, column."""
    count, depth, height, width = latents.shape
    ids = policy.pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, latents.dtype)
    ids[..., 0] = kind
    return policy.pipe._pack_latents(latents.contiguous(), count, depth, height, width), ids
