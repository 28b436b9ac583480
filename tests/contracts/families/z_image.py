"""A tiny Z-Image pipeline with rectified flow.

Its text encoder is Qwen3. Its time runs from 0 (noise) to 1, and it predicts the negative of the velocity.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.parts import Family, autoencoder, shifted


def z_image(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(weight)
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text, tokenizer, transformer).save_pretrained(
        folder
    )
    return folder


FAMILIES = {"z-image": Family(z_image, unguided={"guidance_scale": 0.0}, target="flow", sigma=shifted(3.0))}
