"""A tiny Krea 2 pipeline: two layers of Qwen 3 VL, Qwen-Image's autoencoder, and a chat template with padding inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor
from transformers import Qwen3VLModel

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.parts import Family, dynamic
from tests.contracts.families.qwen_image import autoencoder, pack
from tests.contracts.families.qwen_image21 import VISION, qwen3_vl


def krea2(folder: Path) -> Path:
    torch.manual_seed(0)
    words = qwen_tokenizer()
    words.add_tokens(list(VISION), special_tokens=True)
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400)
    text = Qwen3VLModel(qwen3_vl(words, layers=2))
    Krea2Pipeline(
        scheduler, autoencoder(), text, words, transformer, text_encoder_select_layers=(1, 2)
    ).save_pretrained(folder)
    return folder


def unpack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._unpack_latents(latents, size, size).squeeze(2)


FAMILIES = {
    "krea2": Family(
        krea2,
        unguided={"guidance_scale": 0.0},
        pack=pack,
        unpack=unpack,
        target="flow",
        sigma=dynamic(64, most=6400),
    )
}
