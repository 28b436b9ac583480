"""The reference: the same question asked of other weights.

Each function gives `reference(model, batch) -> LogProbs`, without gradient. The reference is asked before the policy,
so that the policy's activations are not alive meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpo_mm.config import TrainConfig, nearest
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.protocol import Batch

Reference = Callable[[nn.Module, Batch], LogProbs]


def adapter_off(policy: Any) -> Reference:
    """The policy's own weights with its adapter switched off: no second copy in memory."""

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), policy.adapter_off():
            return policy.log_probs(model, batch)

    return reference


def frozen_copy(policy: Any) -> Reference:
    """A copy of the weights as they are now: for full fine-tuning."""
    copied = policy.frozen_copy()

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad():
            return policy.log_probs(copied, batch)

    return reference


def precomputed(policy: Any) -> Reference:
    """Numbers computed before and kept with the pairs, see `dpo_mm.encoding.keep_reference`."""

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        if "reference_chosen" not in batch:
            raise ValueError("reference 'precomputed': these pairs carry no reference log-probs; compute them first")
        chosen, rejected = batch["reference_chosen"], batch["reference_rejected"]
        terms = (
            batch.get("terms_chosen", torch.ones_like(chosen)),
            batch.get("terms_rejected", torch.ones_like(rejected)),
        )
        return LogProbs(chosen, rejected, *terms, exact=policy.exact)

    return reference


REFERENCES: dict[str, Callable[[Any], Reference]] = {
    "adapter_off": adapter_off,
    "frozen_copy": frozen_copy,
    "precomputed": precomputed,
}


def choose_name(config: TrainConfig) -> str:
    """The reference's name; auto is adapter_off with a LoRA, else frozen_copy. Raises ValueError where it won't do."""
    name = config.reference
    if name == "auto":
        name = "adapter_off" if config.tuning == "lora" else "frozen_copy"
    if name not in REFERENCES:
        raise ValueError(f"reference {name!r} is unknown; {nearest(name, REFERENCES)}")
    return name


def choose(policy: Any, config: TrainConfig) -> Reference:
    """The reference that the config names."""
    return REFERENCES[choose_name(config)](policy)
