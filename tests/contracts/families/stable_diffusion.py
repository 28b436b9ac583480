"""Tiny Stable Diffusion pipelines: epsilon prediction, v prediction, epsilon with the tiny autoencoder, InstructPix2Pix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from tests.contracts.families.parts import Family, autoencoder, clip_encoder
from tests.contracts.families.words import clip_tokenizer


def stable_diffusion(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    tiny_vae: bool = False,
    kind: Any = StableDiffusionPipeline,
    in_channels: int = 4,
) -> Path:
    """Write a Stable Diffusion pipeline with random weights for 32x32 images."""
    torch.manual_seed(0)
    words = clip_tokenizer(folder / "tokenizer")
    widths = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    tiny = AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)) if tiny_vae else None
    vae = tiny or autoencoder()
    text = clip_encoder(words)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = kind(
        vae, text, words, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return folder


def stable_diffusion_v(folder: Path) -> Path:
    return stable_diffusion(folder, prediction_type="v_prediction")


def stable_diffusion_tiny_vae(folder: Path) -> Path:
    return stable_diffusion(folder, tiny_vae=True)


def instruct_pix2pix(folder: Path) -> Path:
    return stable_diffusion(folder, kind=StableDiffusionInstructPix2PixPipeline, in_channels=8)


FAMILIES = {
    "stable-diffusion": Family(stable_diffusion),
    "stable-diffusion-v": Family(stable_diffusion_v, target="v"),
    "stable-diffusion-tiny-vae": Family(stable_diffusion_tiny_vae),
    "instruct-pix2pix": Family(instruct_pix2pix),
}
