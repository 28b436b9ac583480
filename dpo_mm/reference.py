"""The reference: the same question asked of other weights.

Each function gives `reference(model, batch) -> LogProbs`, without gradient. The reference is asked before the policy,
so that the policy's activations are not alive meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dpo_mm.collate import groups_of
from dpo_mm.config import TrainConfig, nearest
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.protocol import Batch
from dpo_mm.progress import progress

Reference = Callable[[nn.Module, Batch], LogProbs]
Shard = Callable[[nn.Module], Any] | None


def adapter_off(policy: Any, shard: Shard = None) -> Reference:
    """The policy's own weights with its adapter switched off: no second copy in memory."""

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), policy.adapter_off():
            return policy.log_probs(model, batch)

    return reference


def frozen_copy(policy: Any, shard: Shard = None) -> Reference:
    """A copy of the weights as they are now: for full fine-tuning. shard: spreads it over the processes, in place."""
    copied = policy.frozen_copy()
    if shard is not None:
        shard(copied)

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad():
            return policy.log_probs(copied, batch)

    return reference


def precomputed(policy: Any, shard: Shard = None) -> Reference:
    """Numbers computed before and kept with the pairs, see `keep_reference`."""

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


REFERENCES: dict[str, Callable[[Any, Shard], Reference]] = {
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


def choose(policy: Any, config: TrainConfig, shard: Shard = None) -> Reference:
    """The reference that the config names. shard: what spreads a second model over the processes, if anything does."""
    return REFERENCES[choose_name(config)](policy, shard)


class WithReference:
    """Encoded rows with the reference's log-probs at each of K fixed visits, (K,) a side."""

    def __init__(self, rows: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        self.rows, self.chosen, self.rejected, self.groups = rows, chosen, rejected, groups_of(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        kept = {"reference_chosen": self.chosen[number], "reference_rejected": self.rejected[number]}
        return {**self.rows[number], **kept}


@torch.no_grad()
def keep_reference(policy: Any, rows: Any, config: TrainConfig, *, draws: int) -> WithReference:
    """The reference's log-probs of every row at its first `draws` visits, asked once, before training."""
    device = next(policy.model.parameters()).device
    chosen, rejected = torch.empty(len(rows), draws), torch.empty(len(rows), draws)
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    with off, progress("asking the reference", len(rows) * draws) as advance:
        for visit in range(draws):
            for part in _batches(rows, config.batch_size):
                batch = policy.collate([{**rows[n], "visit": visit} for n in part])
                found = policy.log_probs(policy.model, _moved(batch, device))
                chosen[part.start : part.stop, visit] = found.chosen.cpu()
                rejected[part.start : part.stop, visit] = found.rejected.cpu()
                advance(len(part))
    return WithReference(rows, chosen, rejected)


def _batches(rows: Any, size: int) -> Iterator[range]:
    """Row numbers of a set in batches of one group each."""
    for group in groups_of(rows):
        for start in range(group.start, group.stop, size):
            yield range(start, min(start + size, group.stop))


def _moved(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
