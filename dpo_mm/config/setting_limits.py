"""Ranges of numeric settings, checked when a config is made, before any work, and what `precision: auto` is on this machine."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple


class Limits(NamedTuple):
    """Smallest and largest value of a setting, and whether the largest itself is allowed."""

    low: float
    high: float = math.inf
    includes_high: bool = True

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"from {self.low:.0f} to {self.high:.0f}" if self.includes_high else f"in [{self.low:g}, {self.high:g})"


COUNTS = (
    "steps", "batch_size", "accumulate", "log_every", "save_total_limit", "lora_rank", "lora_alpha", "max_length", "resolution", "min_pixels", "max_pixels",
    "reference_sync_steps", "images_per_prompt", "pairs_per_prompt", "responses_per_question", "max_prompts", "max_questions",
    "num_inference_steps", "max_new_tokens", "shard_size",
)  # fmt: skip
"""Settings that are at least 1."""
NOT_NEGATIVE = (
    "learning_rate", "warmup_steps", "max_grad_norm", "weight_decay", "sft_weight", "fixed_draws_per_row", "eval_every",
    "save_every", "sample_steps", "early_stopping_patience", "workers", "min_score_gap", "temperature", "edited_token_weight",
)  # fmt: skip
"""Settings that are at least 0."""
LIMITS = {
    **{name: Limits(1) for name in COUNTS},
    **{name: Limits(0) for name in NOT_NEGATIVE},
    "seed": Limits(0, 2**32 - 1),
    "server_timeout": Limits(0.1),
    "eval_fraction": Limits(0, 1, includes_high=False),
    "reference_ema_decay": Limits(0, 1, includes_high=False),
    "proportion_empty_prompts": Limits(0, 1, includes_high=False),
    "num_train_epochs": Limits(0),
}
"""Range of each numeric setting, by name."""


def resolve_precision(name: str) -> str:
    """Return the precision of a run on this machine.

    Args:
        name: fp32, bf16 or fp16, or auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16.

    Raises:
        ValueError: if the GPU does not have it.
    """
    if name not in ("auto", "bf16"):
        return name
    import torch

    if not torch.cuda.is_available():
        return "fp32" if name == "auto" else name
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if name == "bf16":
        raise ValueError(
            f"precision bf16: this GPU ({torch.cuda.get_device_name()}) does not have it. Use fp16 or fp32"
        )
    return "fp16"


class Settings:
    """Base of the configs. A number outside its range, or one that is not finite, is refused.

    The precision "auto" is replaced by that of this machine, so that it is part of what is recorded.

    Raises:
        ValueError: with the setting, its value and its range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}. Expected a finite number")
            limits = LIMITS.get(field.name)
            too_high = limits and (value > limits.high or (value == limits.high and not limits.includes_high))
            if limits and (value < limits.low or too_high):
                raise ValueError(f"{field.name} is {value}. Expected a value {limits}")
        if isinstance(precision := getattr(self, "precision", None), str):
            object.__setattr__(self, "precision", resolve_precision(precision))
