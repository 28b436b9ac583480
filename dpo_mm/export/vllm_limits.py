"""Limits of vLLM's LoRA loader.

Source: vLLM's `vllm/lora/peft_helper.py` and `vllm/config/lora.py` (Apache-2.0), tried on a server of vLLM 0.32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_mm.policies.adapter_checks import ADAPTER_FILE, ADAPTER_WEIGHTS

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank."""
NON_LANGUAGE_PARTS = ("vision", "visual", "image", "audio", "projector", "connector", "merger", "resampler", "aligner")
"""Parts of the names of modules outside the language model, in transformers' models. By default vLLM ignores their LoRA."""
NOT_LOADED = {
    "use_dora": "has DoRA",
    "lora_bias": "has biases",
    "modules_to_save": "has modules_to_save",
    "alora_invocation_tokens": "is an activated LoRA",
    "layer_replication": "has layer_replication",
    "use_bdlora": "is block-diagonal",
    "use_qalora": "has QALoRA",
}
"""Settings of PEFT's adapters that vLLM does not load."""
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` after which the base has its own weights. Others, such as pissa, change them."""
PATTERNS = {"rank_pattern": "has several ranks", "alpha_pattern": "has several alphas"}
"""Settings that vLLM 0.32 loads. vLLM 0.16 scales such adapters wrongly, without a message."""


def served_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that serves an adapter's rank. Raises ValueError if there is none."""
    if rank > RANKS[-1]:
        raise ValueError(f"rank {rank} is above {RANKS[-1]}")
    return next(limit for limit in RANKS if limit >= rank)


def why_not_served(folder: Path) -> str | None:
    """Return why vLLM does not serve an adapter in PEFT's format, as the end of a sentence, or None if it does."""
    settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if reason := _unsupported(settings):
        return f"{reason}, which vLLM does not load"
    if reason := next((reason for name, reason in PATTERNS.items() if settings.get(name)), None):
        return f"{reason}, which vLLM before 0.32 may scale wrongly"
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    seen = next((name for name in names if any(part in name for part in NON_LANGUAGE_PARTS)), None)
    return f"adapts more than the language model ({seen}), which vLLM ignores" if seen else None


def _unsupported(settings: dict[str, Any]) -> str | None:
    """Return the first setting of an adapter that vLLM does not load, as the end of a sentence."""
    if reason := next((reason for name, reason in NOT_LOADED.items() if settings.get(name)), None):
        return reason
    if settings.get("bias", "none") != "none":
        return f"has bias {settings['bias']}"
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        return f"has init_lora_weights {init}"
    return f"has rank {settings['r']}, above {RANKS[-1]}" if settings["r"] > RANKS[-1] else None
