"""The reference: the same question asked of other weights.

Each is `reference(model, batch) -> LogProbs`, without gradient. It is asked before the policy, so that the policy's
activations are not alive meanwhile. Those that follow the policy keep a copy of what trains, no more, and it is part of
every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.config import TrainConfig, nearest
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.protocol import Batch

Reference = Callable[[nn.Module, Batch], LogProbs]
FILE = "reference.safetensors"


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


class Following:
    """A reference that follows the policy: every `every` steps it keeps `decay` of itself and takes the rest from there.

    Starts as the policy is when this is made. Source: TR-DPO, Gorbatovski et al. 2024 (2404.09656), soft (every 1) and
    hard (decay 0) update. Raises ValueError outside the ranges.
    """

    def __init__(self, policy: Any, *, decay: float, every: int) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"reference_decay must be in [0, 1), got {decay}; 0.99 forgets half in 69 steps")
        if every < 1:
            raise ValueError(f"reference_every must be at least 1, got {every}; TR-DPO takes 512")
        self.policy, self.decay, self.every = policy, decay, every
        self.trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        self.kept = {name: p.detach().clone() for name, p in self.trained.items()}

    def __call__(self, model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), self._swapped():
            return self.policy.log_probs(model, batch)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Within it the policy has the reference's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.trained.items():
            parameter.data, self.kept[name] = self.kept[name], parameter.data

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After a step of the policy, counted from 1."""
        if step % self.every == 0:
            for name, parameter in self.trained.items():
                self.kept[name].lerp_(parameter, 1 - self.decay)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in self.kept.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises ValueError where it is missing or of another model."""
        from safetensors.torch import load_file

        stored: dict[str, Tensor] = load_file(folder / FILE) if (folder / FILE).exists() else {}
        if stored.keys() != self.kept.keys():
            raise ValueError(
                f"{folder / FILE} is missing or of another model; start again, or resume an older checkpoint"
            )
        for name, tensor in stored.items():
            self.kept[name].copy_(tensor)


def moving_average(policy: Any, config: TrainConfig) -> Reference:
    """The mean of the policy's past weights, each step counting `reference_decay` of the next one's."""
    return Following(policy, decay=config.reference_decay, every=1)


def synced(policy: Any, config: TrainConfig) -> Reference:
    """The policy as it was at the last multiple of `reference_every` steps."""
    return Following(policy, decay=0.0, every=config.reference_every)


REFERENCES: dict[str, Callable[[Any, TrainConfig], Reference]] = {
    "adapter_off": lambda policy, _: adapter_off(policy),
    "frozen_copy": lambda policy, _: frozen_copy(policy),
    "precomputed": lambda policy, _: precomputed(policy),
    "moving_average": moving_average,
    "synced": synced,
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
    return REFERENCES[choose_name(config)](policy, config)
