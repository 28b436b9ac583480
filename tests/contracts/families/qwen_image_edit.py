"""A tiny Qwen-Image-Edit pipeline of two images: the text encoder sees them, and their tokens follow those of the latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as upstream
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from tests.contracts.families import qwen_image
from tests.contracts.families.chat_words import VISION_TOKENS, qwen_tokenizer
from tests.contracts.families.parts import Family, dynamic


def qwen_image_edit(folder: Path) -> Path:
    # The pipeline resizes images to edit to these areas. The published ones would take minutes.
    upstream.VAE_IMAGE_SIZE, upstream.CONDITION_IMAGE_SIZE = 32**2, 64**2
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(VISION_TOKENS)
    pixels = Qwen2VLImageProcessor(size={"shortest_edge": 784, "longest_edge": 78400}, patch_size=14, merge_size=2)
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>")}
    processor = Qwen2VLProcessor(pixels, tokenizer, Qwen2VLVideoProcessor())
    text = qwen_image.qwen2_5_vl(tokenizer, **ids)
    parts = (qwen_image.flow(), qwen_image.autoencoder(), text, tokenizer, processor, qwen_image.denoiser())
    QwenImageEditPlusPipeline(*parts).save_pretrained(folder)
    return folder


FAMILIES = {
    "qwen-image-edit": Family(
        qwen_image_edit,
        unguided={"true_cfg_scale": 1.0},
        pack=qwen_image.pack,
        unpack=qwen_image.unpack,
        target="flow",
        sigma=dynamic(64, most=8192, top=0.9),
    )
}
