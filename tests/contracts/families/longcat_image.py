"""A tiny LongCat-Image pipeline: Qwen2.5-VL, which reads quoted text letter by letter, and latents of 16 channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.flux import pack, unpack
from tests.contracts.families.parts import Family, autoencoder, dynamic
from tests.contracts.families.qwen_image import qwen2_5_vl


def longcat_image(folder: Path) -> Path:
    torch.manual_seed(0)
    words = qwen_tokenizer()
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor())
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    vae = autoencoder(
        channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    LongCatImagePipeline(scheduler, vae, qwen2_5_vl(words), words, processor, transformer).save_pretrained(folder)
    return folder


FAMILIES = {
    "longcat-image": Family(
        longcat_image,
        unguided={"guidance_scale": 1.0, "enable_prompt_rewrite": False},
        pack=pack,
        unpack=unpack,
        target="flow",
        sigma=dynamic(64),
        reason="diffusers loads no LoRA into LongCat-Image's pipeline; PEFT does: `PeftModel.from_pretrained(pipe.transformer, folder)`",
    )
}
