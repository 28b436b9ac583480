"""A tiny ERNIE-Image pipeline: Mistral 3 without chat template, FLUX.2's autoencoder, no model that rewrites prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Mistral3Model

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.flux2_dev import mistral3
from tests.contracts.families.flux2_klein import flux2_autoencoder
from tests.contracts.families.parts import Family, shifted


def ernie_image(folder: Path) -> Path:
    torch.manual_seed(0)
    words = qwen_tokenizer()
    words.model_max_length = 256
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
        text_in_dim=8, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    for part in (transformer.adaLN_modulation[-1], transformer.final_linear):  # zeros in a new model
        torch.nn.init.normal_(part.weight, std=0.1)
    ErnieImagePipeline(
        transformer,
        flux2_autoencoder(),
        Mistral3Model(mistral3(len(words), layers=3)),
        words,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


FAMILIES = {"ernie-image": Family(ernie_image, unguided={"guidance_scale": 1.0}, target="flow", sigma=shifted(3.0))}
