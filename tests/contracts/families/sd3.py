"""Tiny Stable Diffusion 3 pipelines: 3 with T5, and 3.5 (dual attention, normalised queries) without T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.contracts.families.parts import Family, autoencoder, clip_encoder_pooled, t5_encoder
from tests.contracts.families.words import clip_tokenizer, t5_tokenizer


def sd3(folder: Path, *, t5: bool = True, **more: Any) -> Path:
    torch.manual_seed(0)
    words, others, pieces = clip_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        **more,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder_pooled(words),
        tokenizer=words,
        text_encoder_2=clip_encoder_pooled(others),
        tokenizer_2=others,
        text_encoder_3=t5_encoder(pieces, width=32) if t5 else None,
        tokenizer_3=pieces if t5 else None,
    )
    pipe.save_pretrained(folder)
    return folder


def sd35_without_t5(folder: Path) -> Path:
    return sd3(folder, t5=False, qk_norm="rms_norm", dual_attention_layers=(0,))


def shifted(level: float) -> float:
    return 3 * level / (1 + 2 * level)


FAMILIES = {
    "sd3": Family(sd3, target="flow", sigma=shifted, kohya=False),
    "sd3.5-without-t5": Family(
        sd35_without_t5, target="flow", sigma=shifted, kohya=False, left_out=("text_encoder_3", "tokenizer_3")
    ),
}
