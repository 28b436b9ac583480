"""A tiny FLUX.2 klein pipeline with rectified flow.

Its prompt embeddings are hidden states of three layers of Qwen3. Its latents are 2x2 patches, normalised by the
autoencoder's batch norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.parts import Family, dynamic


def flux2_klein(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    # The pipeline reads the hidden states of layers 9, 18 and 27.
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=28,
            num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    Flux2KleinPipeline(scheduler, flux2_autoencoder(), text, tokenizer, transformer).save_pretrained(folder)
    return folder


def flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
        layers_per_block=1,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def pack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    return pipe._pack_latents(latents)


def unpack(pipe: Any, latents: Tensor, size: int) -> Tensor:
    side = size // (2 * pipe.vae_scale_factor)
    latent_ids = pipe._prepare_latent_ids(latents.new_empty(len(latents), 1, side, side))
    return pipe._unpack_latents_with_ids(latents, latent_ids, side, side)


FAMILIES = {"flux2-klein": Family(flux2_klein, pack=pack, unpack=unpack, target="flow", sigma=dynamic(64))}
