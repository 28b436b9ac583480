"""A tiny pipeline of PixArt-Sigma: T5, epsilon prediction with a learned sigma that is not used."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.contracts.families.parts import Family, autoencoder, t5_encoder
from tests.contracts.families.words import t5_tokenizer


def pixart_sigma(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    text = t5_encoder(tokenizer)
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    vae = autoencoder()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    PixArtSigmaPipeline(tokenizer, text, vae, transformer, scheduler).save_pretrained(folder)
    return folder


FAMILIES = {
    "pixart-sigma": Family(
        pixart_sigma,
        unguided={"guidance_scale": 1.0, "use_resolution_binning": False},
        betas=(0.0001, 0.02, "linear"),
        reason="diffusers loads no LoRA into PixArt-Sigma's pipeline; PEFT does: `PeftModel.from_pretrained(pipe.transformer, folder)`",
    )
}
