"""Small parts of random weights that several families' pipelines are made of, and what a builder's row says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def as_they_are(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return latents


@dataclass(frozen=True)
class Family:
    """How a family is built and asked in tests, in the words of its stock pipeline.

    build: writes a tiny pipeline into a folder. size: pixels on a side. unguided: arguments that switch its
    classifier-free guidance off. pack: latents (images, c, h, w) as its scheduler steps on them, for pictures of a size;
    unpack: the other way round; both with the pipeline's own functions. target: epsilon | v | flow. betas: the schedule's
    first and last and their kind. sigma: a flow's noise share at a level in [0, 1), by its paper's formula. kohya: whether
    diffusers reads kohya's format for it. left_out: optional parts that the pipeline is built without. reason: why a
    saved adapter is loaded by another stock library than the pipeline's own.
    """

    build: Callable[[Path], Path]
    size: int = 32
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    pack: Callable[[Any, Tensor, int], Tensor] = as_they_are
    unpack: Callable[[Any, Tensor, int], Tensor] = as_they_are
    target: str = "epsilon"
    betas: tuple[float, float, str] = (0.00085, 0.012, "scaled_linear")
    sigma: Callable[[float], float] | None = None
    kohya: bool = True
    left_out: tuple[str, ...] = ()
    reason: str | None = None


def shifted(shift: float) -> Callable[[float], float]:
    """Esser et al. 2024 eq. 23."""
    return lambda level: shift * level / (1 + (shift - 1) * level)


def dynamic(tokens: int, *, most: int = 4096, base: float = 0.5, top: float = 1.15) -> Callable[[float], float]:
    """The same with the shift e^mu, mu on a line through (256, base) and (most, top)."""
    mu = base + (top - base) * (tokens - 256) / (most - 256)
    return lambda level: math.exp(mu) / (math.exp(mu) + 1 / level - 1)


def autoencoder(*, channels: int = 4, scaling_factor: float = 0.7, **more: Any) -> AutoencoderKL:
    """A factor-2 autoencoder."""
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=scaling_factor,
        **more,
    )


def clip_config(words: CLIPTokenizer, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **more,
    )


def clip_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(clip_config(words))


def clip_encoder_pooled(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(words, projection_dim=16))


def t5_encoder(words: T5TokenizerFast, *, width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )
