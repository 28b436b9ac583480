"""The reference: the same question asked of other weights.

Each is `reference(model, batch) -> LogProbs`, without gradient. It is asked before the policy, so that the policy's
activations are not alive meanwhile. Those that follow the policy keep a copy of what trains, no more, and it is part of
every checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.protocol import Batch, ImagePolicy, Policy, TextPolicy
from dpo_mm.progress import progress_bar
from dpo_mm.training import reference_cache
from dpo_mm.training.encoding import cache_folder
from dpo_mm.training.pair_stream import PairStream, buckets_of

Reference = Callable[[nn.Module, Batch], LogProbs]
Shard = Callable[[nn.Module], Any] | None
REFERENCE_FILE = "reference.safetensors"


def adapter_off(policy: Policy, shard: Shard = None) -> Reference:
    """The policy's own weights with its adapter switched off: no second copy in memory."""

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), policy.adapter_off():
            return policy.log_probs(model, batch)

    return reference


def frozen_copy(policy: Policy, shard: Shard = None) -> Reference:
    """A copy of the weights as they are now: for full fine-tuning. shard: spreads it over the processes, in place."""
    copied = policy.frozen_copy()
    if shard is not None:
        shard(copied)

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad():
            return policy.log_probs(copied, batch)

    return reference


def precomputed(policy: Policy, shard: Shard = None) -> Reference:
    """Numbers computed before and kept with the pairs, see `precompute_reference_log_probs`."""

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        if "reference_chosen" not in batch:
            raise ValueError("reference 'precomputed': these pairs carry no reference log-probs; compute them first")
        chosen, rejected = batch["reference_chosen"], batch["reference_rejected"]
        terms = (
            batch.get("num_tokens_chosen", torch.ones_like(chosen)),
            batch.get("num_tokens_rejected", torch.ones_like(rejected)),
        )
        return LogProbs(chosen, rejected, *terms, is_likelihood=policy.modality == "text")

    return reference


class TrackingReference:
    """A reference that follows the policy: every `every` steps it keeps `decay` of itself and takes the rest from there.

    Starts as the policy is when this is made. Source: TR-DPO, Gorbatovski et al. 2024 (2404.09656), soft (every 1) and
    hard (decay 0) update. Raises ValueError outside the ranges.
    """

    def __init__(self, policy: Policy, *, decay: float, every: int) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"reference_ema_decay must be in [0, 1), got {decay}; 0.99 forgets half in 69 steps")
        if every < 1:
            raise ValueError(f"reference_sync_steps must be at least 1, got {every}; TR-DPO takes 512")
        self.policy, self.decay, self.every = policy, decay, every
        self.trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        self.kept = {name: p.detach().clone() for name, p in self.trained.items()}

    def __call__(self, model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), self._swapped():
            return self.policy.log_probs(model, batch)

    @contextlib.contextmanager
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
        torch.clear_autocast_cache()  # it holds half-precision copies by parameter, not by the parameter's data

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After a step of the policy, counted from 1."""
        if step % self.every == 0:
            for name, parameter in self.trained.items():
                self.kept[name].lerp_(parameter, 1 - self.decay)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in self.kept.items()}, folder / REFERENCE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises ValueError where it is missing or of another model."""
        from safetensors.torch import load_file

        stored: dict[str, Tensor] = load_file(folder / REFERENCE_FILE) if (folder / REFERENCE_FILE).exists() else {}
        if stored.keys() != self.kept.keys():
            raise ValueError(
                f"{folder / REFERENCE_FILE} is missing or of another model; start again, or resume an older checkpoint"
            )
        for name, tensor in stored.items():
            self.kept[name].copy_(tensor)


def moving_average(policy: Policy, config: TrainConfig) -> Reference:
    """The mean of the policy's past weights, each step counting `reference_ema_decay` of the next one's."""
    return TrackingReference(policy, decay=config.reference_ema_decay, every=1)


def synced(policy: Policy, config: TrainConfig) -> Reference:
    """The policy as it was at the last multiple of `reference_sync_steps` steps."""
    return TrackingReference(policy, decay=0.0, every=config.reference_sync_steps)


REFERENCES: dict[str, Callable[[Any, TrainConfig, Shard], Reference]] = {
    "adapter_off": lambda policy, _, shard: adapter_off(policy, shard),
    "frozen_copy": lambda policy, _, shard: frozen_copy(policy, shard),
    "precomputed": lambda policy, _, shard: precomputed(policy, shard),
    "moving_average": lambda policy, config, _: moving_average(policy, config),
    "synced": lambda policy, config, _: synced(policy, config),
}


def resolve_reference_name(config: TrainConfig) -> str:
    """The reference's name; auto is adapter_off with a LoRA, else frozen_copy. Raises ValueError where it won't do."""
    name = config.reference
    if name == "auto":
        name = "adapter_off" if config.tuning == "lora" else "frozen_copy"
    if name not in REFERENCES:
        raise ValueError(f"reference {name!r} is unknown; {did_you_mean(name, REFERENCES)}")
    return name


def build_reference(policy: Policy, config: TrainConfig, shard: Shard = None) -> Reference:
    """The reference that the config names. shard: what spreads a second model over the processes, if anything does."""
    return REFERENCES[resolve_reference_name(config)](policy, config, shard)


class WithReference:
    """Encoded rows with the reference's log-probs at each of K fixed visits, (K,) a side."""

    def __init__(self, rows: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        self.rows, self.chosen, self.rejected, self.groups = rows, chosen, rejected, buckets_of(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        asked = {"reference_chosen": self.chosen[number], "reference_rejected": self.rejected[number]}
        return {**self.rows[number], **asked}


@torch.no_grad()
def precompute_reference_log_probs(
    policy: ImagePolicy | TextPolicy, stream: PairStream, config: TrainConfig
) -> WithReference:
    """The reference's log-probs of a stream's rows at each of its K fixed draws, asked once, before training.

    Asked in batches of training's size, the last one of a group filled up with rows that were asked already: a row's
    numbers are then those that a reference asked in the step would give, bit for bit where arithmetic doesn't depend on
    the place in a batch. Of answers, which have no draws, once for all runs, see `dpo_mm.training.reference_cache`.
    """
    place = (
        reference_cache.cache_path(policy, stream.rows, cache_folder(), precision=config.precision)
        if policy.modality == "text"
        else None
    )
    if place and (before := reference_cache.load(place)):
        return WithReference(stream.rows, **before)
    device = next(policy.model.parameters()).device
    rows = stream.rows
    sides = torch.empty(2, len(rows), stream.num_fixed_draws)
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    mixed = torch.autocast(device.type, half, enabled=half is not None)
    with off, mixed, progress_bar("asking the reference", len(rows) * stream.num_fixed_draws) as advance:
        for visit in range(stream.num_fixed_draws):
            for numbers, fresh in _batches(rows, config.batch_size):
                batch = policy.collate([stream.row_at_epoch(n, visit) for n in numbers])
                found = policy.log_probs(policy.model, _moved(batch, device))
                for side, values in zip(sides, (found.chosen, found.rejected), strict=True):
                    side[torch.tensor(numbers), visit] = values.float().cpu()
                advance(fresh)
    if place:
        reference_cache.save(place, chosen=sides[0].clone(), rejected=sides[1].clone())
    return WithReference(rows, sides[0], sides[1])


def _batches(rows: Any, size: int) -> Iterator[tuple[list[int], int]]:
    """Row numbers of a set in whole batches of one group each, and how many of them are new."""
    for group in buckets_of(rows):
        for start in range(0, len(group), size):
            yield [group[n % len(group)] for n in range(start, start + size)], min(size, len(group) - start)


def _moved(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
