"""A tiny Sana pipeline with rectified flow.

Its text encoder is Gemma 2, which gets a long instruction before the prompt. Its deep-compression autoencoder has no
posterior.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tests.contracts.families.chat_words import gemma_tokenizer
from tests.contracts.families.parts import Family, shifted


def sana(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    text = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    widths = {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16)}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    kinds = {
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    }
    scales = {"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))}
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **kinds, **widths, **layers, **scales
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    SanaPipeline(tokenizer, text, vae, transformer, scheduler).save_pretrained(folder)
    return folder


FAMILIES = {
    "sana": Family(
        sana,
        unguided={"guidance_scale": 1.0, "use_resolution_binning": False},
        target="flow",
        sigma=shifted(3.0),
    )
}
