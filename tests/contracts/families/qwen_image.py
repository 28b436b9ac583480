"""A tiny Qwen-Image pipeline with rectified flow.

Its text encoder is Qwen2.5-VL. Its video autoencoder has a mean and a standard deviation per latent channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.parts import Family, dynamic


def qwen2_5_vl(words: Any, **ids: int) -> Qwen2_5_VLForConditionalGeneration:
    """A text encoder for a tokenizer of Qwen."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
            **ids,
        )
    )  # fmt: skip


def denoiser() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, -0.4], latents_std=[0.5, 0.7, 1.2, 0.9],
    )  # fmt: skip


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def qwen_image(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text, transformer, vae = qwen2_5_vl(tokenizer), denoiser(), autoencoder()
    QwenImagePipeline(flow(), vae, text, tokenizer, transformer).save_pretrained(folder)
    return folder


def pack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._pack_latents(latents[:, None], *latents.shape)


def unpack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor).squeeze(2)


FAMILIES = {
    "qwen-image": Family(
        qwen_image,
        unguided={"true_cfg_scale": 1.0},
        pack=pack,
        unpack=unpack,
        target="flow",
        sigma=dynamic(64, most=8192, top=0.9),
    )
}
