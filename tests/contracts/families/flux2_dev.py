"""A tiny FLUX.2 dev pipeline: klein's autoencoder and tokens, Mistral 3 with a chat template, embedded guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.flux2_klein import flux2_autoencoder, pack
from tests.contracts.families.parts import Family, dynamic

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)


def mistral3(tokens: int, *, layers: int) -> Mistral3Config:
    """A configuration of Mistral 3 whose last token is that of images."""
    return Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": tokens, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": layers, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "head_dim": 8, "image_size": 28, "patch_size": 14,
        },
        image_token_index=tokens - 1,
    )  # fmt: skip


def flux2_dev(folder: Path) -> Path:
    torch.manual_seed(0)
    words = qwen_tokenizer()
    words.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    processor = PixtralProcessor(PixtralImageProcessor(), words, patch_size=14, chat_template=TEMPLATE)
    # The pipeline reads the hidden states of layers 10, 20 and 30.
    text = Mistral3ForConditionalGeneration(mistral3(len(words), layers=31))
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    Flux2Pipeline(scheduler, flux2_autoencoder(), text, processor, transformer).save_pretrained(folder)
    return folder


def unpack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    side = size // (2 * pipe.vae_scale_factor)
    return pipe._unpack_latents_with_ids(
        latents, pipe._prepare_latent_ids(latents.new_empty(len(latents), 1, side, side))
    )


FAMILIES = {
    "flux2-dev": Family(
        flux2_dev, unguided={"guidance_scale": 4.0}, pack=pack, unpack=unpack, target="flow", sigma=dynamic(64)
    )
}
