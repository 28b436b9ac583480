"""Parts of published models on the meta device: their config values, and modules without weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from dpo_mm.policies.diffusion.meta_pipeline import fill_small_buffers
from dpo_mm.policies.vlm.vlm_policy import DTYPES
from tests.bench.diffusion_step import SD_VAE
from tests.contracts.families.words import clip_tokenizer

T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
QWEN3_4B = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}  # fmt: skip
QWEN2_5_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
                 "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
                 "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
QWEN2_5_TEXT = {
    "3B": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2},
    "7B": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4},
    "tiny": {"vocab_size": 2112, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip
QWEN2_5_TINY_TOWER = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
                      "fullatt_block_indexes": [1]}  # fmt: skip
QWEN3_8B_TEXT = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN3_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
               "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096,
               "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
SD3_MEDIUM = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
              "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
              "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
              "dual_attention_layers": tuple(range(13))}  # fmt: skip
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 3 * 2560, "in_channels": 128, "guidance_embeds": False}  # fmt: skip
VAE_16 = {**SD_VAE, "latent_channels": 16, "sample_size": 1024, "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4, "use_quant_conv": False, "use_post_quant_conv": False}  # fmt: skip


def on_meta(kind: Any, precision: str, **config: Any) -> Any:
    """A diffusers model on the meta device."""
    with torch.device("meta"):
        return fill_small_buffers(kind(**config).to(DTYPES[precision]))


def text_encoder(kind: Any, config: Any, precision: str) -> Any:
    """A text encoder of transformers on the meta device."""
    with torch.device("meta"):
        return fill_small_buffers(kind(config).to(DTYPES[precision]).eval())


def qwen2_5_tower(size: str) -> dict[str, Any]:
    """Config of the vision tower. Those of 3B and 7B differ in the width of their output only."""
    smaller = QWEN2_5_TINY_TOWER if size == "tiny" else {}
    return {**QWEN2_5_TOWER, **smaller, "out_hidden_size": QWEN2_5_TEXT[size]["hidden_size"]}


def qwen2_5_config(size: str, ids: dict[str, int]) -> Any:
    text = QWEN2_5_TEXT[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.Qwen2_5_VLConfig(
        text_config={**text, **special, "rope_parameters": rope, "max_position_embeddings": 32768},
        vision_config=qwen2_5_tower(size),
        tie_word_embeddings=size == "3B",
        **ids,
    )


def clip_words(length: int = 77) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return clip_tokenizer(Path(folder), length=length)


def clip(kind: Any, shape: dict[str, Any], words: Any, precision: str) -> Any:
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": 49408, "max_position_embeddings": words.model_max_length}
    config = hf.CLIPTextConfig(**shape, **ids, **sizes, projection_dim=shape["hidden_size"])
    return text_encoder(kind, config, precision)
