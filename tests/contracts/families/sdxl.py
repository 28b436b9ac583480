"""A tiny Stable Diffusion XL pipeline with the scheduler of the base model."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from tests.contracts.families.parts import Family, autoencoder, clip_encoder, clip_encoder_pooled
from tests.contracts.families.words import clip_tokenizer


def sdxl(folder: Path) -> Path:
    torch.manual_seed(0)
    words, more = clip_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2")
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13),
        text_encoder=clip_encoder(words),
        text_encoder_2=clip_encoder_pooled(more),
        tokenizer=words,
        tokenizer_2=more,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


BLOCKS = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}
"""Parts of names in kohya's files: one convolution, one block without and one with attention, which have two or one layer each."""
FAMILIES = {"sdxl": Family(sdxl, kohya_blocks=BLOCKS)}
