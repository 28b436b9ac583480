"""A tiny Qwen-Image 2.1 pipeline: Qwen 3 VL, and a video autoencoder of four channels that makes images 16 times smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from torch import Tensor
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.parts import Family, dynamic

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def qwen3_vl(words: Any, *, layers: int = 1) -> Qwen3VLConfig:
    """A configuration of Qwen 3 VL for a tokenizer with the tokens VISION."""
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), words.convert_tokens_to_ids(VISION), strict=True))
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        },
        **{f"{name}_token_id": token for name, token in ids.items()},
    )  # fmt: skip


def qwen_image21(folder: Path) -> Path:
    torch.manual_seed(0)
    words = qwen_tokenizer()
    words.add_tokens(list(VISION), special_tokens=True)
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), words, Qwen3VLVideoProcessor(), chat_template=TEMPLATE)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, False, False, False],
        latents_mean=[0.3, -0.2, 0.1, -0.4], latents_std=[0.5, 0.7, 1.2, 0.9],
    )  # fmt: skip
    text = Qwen3VLForConditionalGeneration(qwen3_vl(words))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    QwenImage21Pipeline(scheduler, vae, text, processor, transformer).save_pretrained(folder)
    return folder


def pack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._pack_latents(latents, *latents.shape)


def unpack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor).squeeze(2)


FAMILIES = {
    "qwen-image-2.1": Family(
        qwen_image21,
        size=64,
        unguided={"true_cfg_scale": 1.0},
        pack=pack,
        unpack=unpack,
        target="flow",
        sigma=dynamic(16),
    )
}
