"""A tiny Wan 2.1 pipeline, which generates clips of five frames: three latent frames of a video autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.contracts.families.parts import Family, shifted
from tests.contracts.families.words import t5_tokenizer


def wan(folder: Path) -> Path:
    torch.manual_seed(0)
    pieces = t5_tokenizer()
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], scale_factor_temporal=2,
        scale_factor_spatial=2, latents_mean=[0.3, -0.2, 0.1, -0.4], latents_std=[0.5, 0.7, 1.2, 0.9],
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(pieces, text, vae, scheduler, transformer).save_pretrained(folder)
    return folder


FAMILIES = {"wan": Family(wan, target="flow", sigma=shifted(3.0), frames=5, left_out=("transformer_2",))}
