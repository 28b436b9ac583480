"""Sizes of the tiny models of `tiny_vlms` and `tiny_readers`."""

from __future__ import annotations

from typing import Any

EDGE = 56
"""Pixels per edge of an image, which has 16 patches of 14 x 14."""


def _text(vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": vocabulary, "max_position_embeddings": 512}
    return {**sizes, **shape, **ids, "initializer_range": 0.12, **more}


def _vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "image_size": EDGE, "patch_size": 14, "initializer_range": 0.12, **more}
