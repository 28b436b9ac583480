"""Limits of vLLM's LoRA loader.

Source: vLLM's `vllm/lora/peft_helper.py` and `vllm/config/lora.py`. vLLM itself does not run in the tests.
"""

from __future__ import annotations

import json
from pathlib import Path

from dpo_mm.policies.adapter_checks import ADAPTER_FILE, ADAPTER_WEIGHTS

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank."""
VISION_PARTS = ("vision", "visual")
"""Parts of the names of modules outside the language model, in transformers' models."""
NOT_LOADED = {
    "use_dora": "has DoRA",
    "modules_to_save": "has modules_to_save",
    "rank_pattern": "has several ranks",
    "alpha_pattern": "has several alphas",
}
"""Settings of PEFT's adapters that vLLM refuses or ignores."""


def served_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that serves an adapter's rank. Raises ValueError if there is none."""
    if rank > RANKS[-1]:
        raise ValueError(f"rank {rank} is above {RANKS[-1]}")
    return next(limit for limit in RANKS if limit >= rank)


def why_not_served(folder: Path) -> str | None:
    """Return why vLLM does not load an adapter in PEFT's format, or None if it does."""
    from safetensors import safe_open

    settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    for name, reason in NOT_LOADED.items():
        if settings.get(name):
            return reason
    if settings.get("bias", "none") != "none":
        return f"has bias {settings['bias']}"
    if settings["r"] > RANKS[-1]:
        return f"has rank {settings['r']}, above {RANKS[-1]}"
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        seen = next((name for name in file.keys() if any(part in name for part in VISION_PARTS)), None)  # noqa: SIM118
    return f"adapts the vision tower ({seen})" if seen else None
