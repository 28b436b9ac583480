"""A tiny Chroma pipeline: FLUX.1's autoencoder and tokens, one T5, and a mask of its padding."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.contracts.families.flux import pack, unpack
from tests.contracts.families.parts import Family, autoencoder, shifted, t5_encoder
from tests.contracts.families.words import t5_tokenizer


def chroma(folder: Path) -> Path:
    torch.manual_seed(0)
    pieces = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=8,
        approximator_layers=1,
    )  # fmt: skip
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ChromaPipeline(scheduler, vae, t5_encoder(pieces), pieces, transformer).save_pretrained(folder)
    return folder


FAMILIES = {"chroma": Family(chroma, pack=pack, unpack=unpack, target="flow", sigma=shifted(3.0))}
