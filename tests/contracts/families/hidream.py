"""A tiny HiDream pipeline: two CLIP encoders, T5, Llama, and a denoiser with experts.

It scales all sizes to the area of its default size, which the tests set.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from transformers import LlamaConfig, LlamaForCausalLM

from tests.contracts.families.chat_words import qwen_tokenizer
from tests.contracts.families.parts import Family, autoencoder, clip_encoder_pooled, shifted, t5_encoder
from tests.contracts.families.words import clip_tokenizer, t5_tokenizer


def hidream(folder: Path) -> Path:
    torch.manual_seed(0)
    words, others = (clip_tokenizer(folder / name, length=128) for name in ("tokenizer", "tokenizer_2"))
    pieces, chat = t5_tokenizer(), qwen_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(chat), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=32, num_routed_experts=3,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1],
    )  # fmt: skip
    HiDreamImagePipeline(
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        clip_encoder_pooled(words),
        words,
        clip_encoder_pooled(others),
        others,
        t5_encoder(pieces),
        pieces,
        LlamaForCausalLM(llama),
        chat,
        transformer,
    ).save_pretrained(folder)
    return folder


FAMILIES = {
    "hidream": Family(hidream, target="flow", sigma=shifted(3.0), attributes={"default_sample_size": 16}),
}
