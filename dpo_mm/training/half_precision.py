"""Half precision of a run: that of the weights next to a LoRA, or autocast around the float32 weights of a full run.

Frozen weights next to a LoRA are loaded in half precision, and its float32 weights are cast in each product. Autocast would add
nothing but casts, such as those of norms and softmax to float32. Errors, log-probs and losses are float32 in both cases.
"""

from __future__ import annotations

import torch
from transformers import Trainer

from dpo_mm.config import TrainConfig

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def needs_autocast(config: TrainConfig) -> bool:
    """True if the weights are float32 and the run computes in half precision."""
    return config.precision in HALVES and config.tuning == "full"


def autocast(config: TrainConfig, device_type: str) -> torch.autocast:
    """Context manager of a forward pass outside the Trainer, which has the same arithmetic as one in it.

    Args:
        config: settings of the run.
        device_type: cpu or cuda.
    """
    half = HALVES.get(config.precision, torch.bfloat16)
    return torch.autocast(device_type, half, enabled=needs_autocast(config))


def disable_trainer_autocast(trainer: Trainer) -> None:
    """Leave out autocast in a Trainer's steps. Its gradient scaler, which fp16 needs, stays."""
    from accelerate.utils import AutocastKwargs

    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)
