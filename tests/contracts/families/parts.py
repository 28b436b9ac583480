"""Small components with random weights that several families' pipelines share, and the Family row of BUILDERS."""

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


def unchanged(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return latents


@dataclass(frozen=True)
class Family:
    """A row of BUILDERS: how the tests build a family's pipeline and call it."""

    build: Callable[[Path], Path]
    """Write a tiny pipeline into a folder and return the folder."""
    size: int = 32
    """Height and width of its images in pixels."""
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments of the pipeline that switch classifier-free guidance off."""
    pack: Callable[[Any, Tensor, int], Tensor] = unchanged
    """Convert latents (images, c, h, w) to the shape that the scheduler steps on, by the pipeline's own function.

    Its arguments are the pipeline, the latents and the image size in pixels.
    """
    unpack: Callable[[Any, Tensor, int], Tensor] = unchanged
    """The inverse of pack."""
    target: str = "epsilon"
    """The prediction target: epsilon, v or flow."""
    betas: tuple[float, float, str] = (0.00085, 0.012, "scaled_linear")
    """First and last beta of the schedule, and the kind of schedule."""
    sigma: Callable[[float], float] | None = None
    """Fraction of noise of a flow model at a noise level in [0, 1), by the paper's formula."""
    kohya: bool = True
    """True if diffusers reads kohya's format for this family."""
    kohya_blocks: Mapping[str, str] = field(default_factory=dict)
    """Parts of names in kohya's file that differ from those of diffusers, by diffusers' name."""
    frames: int = 1
    """Frames of its clips. 1 for images."""
    left_out: tuple[str, ...] = ()
    """Optional components that the pipeline is built without."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the upstream pipeline that are not saved with it."""
    reason: str | None = None
    """The reason, if a saved adapter is not loaded by the pipeline's own library."""


def shifted(shift: float) -> Callable[[float], float]:
    """A flow's fraction of noise under a constant shift.

    Source: Esser et al. 2024, eq. 23.
    """
    return lambda level: shift * level / (1 + (shift - 1) * level)


def dynamic(tokens: int, *, most: int = 4096, base: float = 0.5, top: float = 1.15) -> Callable[[float], float]:
    """A flow's fraction of noise under the shift exp(mu), where mu is linear in `tokens` through (256, base) and (most, top)."""
    mu = base + (top - base) * (tokens - 256) / (most - 256)
    return lambda level: math.exp(mu) / (math.exp(mu) + 1 / level - 1)


def autoencoder(*, channels: int = 4, scaling_factor: float = 0.7, **more: Any) -> AutoencoderKL:
    """An autoencoder that halves height and width."""
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
