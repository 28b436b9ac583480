"""Tiny FLUX.1 pipelines: dev (embedded guidance, size-dependent shift), schnell (neither), Kontext (image editing)."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from tests.contracts.families.parts import Family, autoencoder, clip_encoder, t5_encoder
from tests.contracts.families.words import clip_tokenizer, t5_tokenizer


def flux(folder: Path, *, kind: Any = FluxPipeline, dev: bool = True) -> Path:
    torch.manual_seed(0)
    words, pieces = clip_tokenizer(folder / "tokenizer"), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(words),
        tokenizer=words,
        text_encoder_2=t5_encoder(pieces),
        tokenizer_2=pieces,
        transformer=transformer,
    )
    pipe.save_pretrained(folder)
    return folder


def pack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._pack_latents(latents, *latents.shape)


def unpack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)


def shifted(level: float) -> float:
    """FLUX's shift: exp(mu) / (exp(mu) + 1 / u - 1).

    mu is linear in the number of tokens, through (256, 0.5) and (4096, 1.15). Latents of 16 x 16 are 64 tokens.
    """
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (64 - 256)
    return math.exp(mu) / (math.exp(mu) + 1 / level - 1)


def schnell(folder: Path) -> Path:
    return flux(folder, dev=False)


FAMILIES = {
    "flux-dev": Family(flux, unguided={"guidance_scale": 3.5}, pack=pack, unpack=unpack, target="flow", sigma=shifted),
    "flux-schnell": Family(
        schnell, unguided={"max_sequence_length": 256}, pack=pack, unpack=unpack, target="flow", sigma=lambda u: u
    ),
    "flux-kontext": Family(
        functools.partial(flux, kind=FluxKontextPipeline),
        unguided={"guidance_scale": 2.5, "max_area": 32**2, "_auto_resize": False},
        pack=pack,
        unpack=unpack,
        target="flow",
        sigma=shifted,
    ),
}
