"""Functions that FLUX.1, FLUX.1 Kontext and Chroma share: prompt encoding, packing of latents, and the velocity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
"""Modules that a LoRA adapts by default."""
TOKENS = {True: 512, False: 256}
"""Number of T5 tokens with embedded guidance (dev) and without (schnell), as in their model cards."""


def max_prompt_tokens(policy: DiffusionPolicy) -> int:
    """Return the number of tokens to which a prompt is padded or truncated."""
    return TOKENS[bool(policy.pipe.transformer.config.guidance_embeds)]


@torch.no_grad()
def encode_prompts(policy: DiffusionPolicy, prompts: Sequence[str]) -> Prompt:
    """Hidden states of T5, (prompts, tokens, width), and CLIP's pooled state, (prompts, width)."""
    embeds, pooled, _ = policy.pipe.encode_prompt(
        list(prompts), None, device=policy.device, max_sequence_length=max_prompt_tokens(policy)
    )
    return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}


def predict_velocity(
    policy: DiffusionPolicy,
    denoiser: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    prompt: Prompt,
    *,
    guidance: float,
    source: Tensor | None = None,
) -> Tensor:
    """Compute the denoiser's velocity, (images, channels, height, width).

    `source` contains the normalised latents of the image to edit, (images, channels, h, w). Its tokens follow the
    image's own tokens, and the first of their position ids is 1 instead of 0.
    """
    count, _, height, width = latents.shape
    tokens, ids = pack_latents(policy, latents, kind=0)
    if source is not None:
        source_tokens, source_ids = pack_latents(policy, source, kind=1)
        tokens, ids = torch.cat([tokens, source_tokens], dim=1), torch.cat([ids, source_ids])
    takes_guidance = policy.pipe.transformer.config.guidance_embeds
    velocity = denoiser(
        hidden_states=tokens,
        timestep=timestep / policy.scheduler.config.num_train_timesteps,
        guidance=torch.full((count,), guidance, device=latents.device) if takes_guidance else None,
        pooled_projections=prompt["pooled"],
        encoder_hidden_states=prompt["embeds"],
        txt_ids=latents.new_zeros(prompt["embeds"].shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return unpack_latents(policy, velocity[:, : height * width // 4], latents.shape)


def pack_latents(policy: DiffusionPolicy, latents: Tensor, *, kind: int) -> tuple[Tensor, Tensor]:
    """Pack latents into tokens, (images, h w / 4, 4 c), with position ids (h w / 4, 3): kind, row, column."""
    count, depth, height, width = latents.shape
    with latents.device:  # a copy from the host would wait for the GPU
        ids = policy.pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, latents.dtype)
    ids[..., 0] = kind
    return policy.pipe._pack_latents(latents.contiguous(), count, depth, height, width), ids


def unpack_latents(policy: DiffusionPolicy, tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert tokens, (images, h w / 4, 4 c), to latents of this shape, (images, c, h, w)."""
    factor = policy.pipe.vae_scale_factor
    return policy.pipe._unpack_latents(tokens, shape[-2] * factor, shape[-1] * factor, factor)
