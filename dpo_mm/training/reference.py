"""Reference models: the same log-probs under other weights.

Each is a function `reference(model, batch) -> LogProbs` without gradient. It runs before the policy, so that the policy's
activations do not take memory at that time. Tracking references store only a copy of the trained parameters, which every
checkpoint includes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.load_pairs import UndecodableImageError
from dpo_mm.errors import did_you_mean
from dpo_mm.files.cache_folder import cache_folder
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.diffusion.text_encoder_lora import trained_model
from dpo_mm.policies.protocol import Batch, ImagePolicy, Policy, TextPolicy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.training import reference_cache
from dpo_mm.training.compilation import compile_blocks, is_compiled
from dpo_mm.training.dropped_rows import DroppedRows, missing_log_probs
from dpo_mm.training.half_precision import autocast, needs_autocast
from dpo_mm.training.pair_stream import PairStream, buckets_of

Reference = Callable[[nn.Module, Batch], LogProbs]
Shard = Callable[[nn.Module], Any] | None
REFERENCE_FILE = "reference.safetensors"


def adapter_off(policy: Policy, shard: Shard = None) -> Reference:
    """Make a reference of the policy's base weights, with the adapter disabled. It needs no second copy in memory."""

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), policy.adapter_off():
            return policy.log_probs(model, batch)

    return reference


def frozen_copy(
    policy: Policy, shard: Shard = None, model: nn.Module | None = None, config: TrainConfig | None = None
) -> Reference:
    """Make a reference of a copy of the current weights, for full fine-tuning.

    Args:
        policy: the prepared policy.
        shard: function that spreads the copy over the processes, in place.
        model: another model of the same kind, to use in place of a copy.
        config: settings of the run. The copy is compiled if they say so and the policy is.
    """
    copied = policy.frozen_copy() if model is None else model
    if config is not None and config.compile and is_compiled(policy):
        compile_blocks(policy, copied, config)
    if shard is not None:
        shard(copied)

    def reference(model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad():
            return policy.log_probs(copied, batch)

    return reference


def precomputed(policy: Policy, shard: Shard = None) -> Reference:
    """Make a reference that reads log-probs from the batch, see `precompute_reference_log_probs`."""

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
    """Reference that follows the policy: every `every` steps it becomes `decay` of itself plus the rest of the policy.

    It starts with the policy's weights.

    Args:
        policy: the prepared policy.
        decay: [0, 1). 0 copies the policy.
        every: steps between updates, at least 1.

    Raises:
        ValueError: if an argument is out of range.

    Source: TR-DPO, Gorbatovski et al. 2024 (2404.09656), soft update (every 1) and hard update (decay 0).
    """

    def __init__(self, policy: Policy, *, decay: float, every: int) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"reference_ema_decay must be in [0, 1), got {decay}; 0.99 forgets half in 69 steps")
        if every < 1:
            raise ValueError(f"reference_sync_steps must be at least 1, got {every}; TR-DPO takes 512")
        self.policy, self.decay, self.every = policy, decay, every
        self.trained = {name: p for name, p in trained_model(policy).named_parameters() if p.requires_grad}
        self.reference_params = {name: p.detach().clone() for name, p in self.trained.items()}

    def __call__(self, model: nn.Module, batch: Batch) -> LogProbs:
        with torch.no_grad(), self._swapped():
            return self.policy.log_probs(model, batch)

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """Context manager in which the policy has the reference's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.trained.items():
            parameter.data, self.reference_params[name] = self.reference_params[name], parameter.data
        torch.clear_autocast_cache()  # it holds half-precision copies by parameter, not by the parameter's data

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the reference after a step of the policy, counted from 1."""
        if step % self.every == 0:
            for name, parameter in self.trained.items():
                self.reference_params[name].lerp_(parameter, 1 - self.decay)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in self.reference_params.items()}, folder / REFERENCE_FILE
        )

    def load(self, folder: Path) -> None:
        """Load what `save` wrote. Raises ValueError if it is missing or belongs to another model."""
        from safetensors.torch import load_file

        stored: dict[str, Tensor] = load_file(folder / REFERENCE_FILE) if (folder / REFERENCE_FILE).exists() else {}
        if stored.keys() != self.reference_params.keys():
            raise ValueError(
                f"{folder / REFERENCE_FILE} is missing or of another model; start again, or resume an older checkpoint"
            )
        for name, tensor in stored.items():
            self.reference_params[name].copy_(tensor)


def moving_average(policy: Policy, config: TrainConfig) -> Reference:
    """Make a reference that is the exponential moving average of the policy, with `reference_ema_decay`."""
    return TrackingReference(policy, decay=config.reference_ema_decay, every=1)


def synced(policy: Policy, config: TrainConfig) -> Reference:
    """Make a reference that is the policy at the last multiple of `reference_sync_steps` steps."""
    return TrackingReference(policy, decay=0.0, every=config.reference_sync_steps)


REFERENCES: dict[str, Callable[[Any, TrainConfig, Shard], Reference]] = {
    "adapter_off": lambda policy, _, shard: adapter_off(policy, shard),
    "frozen_copy": lambda policy, config, shard: frozen_copy(policy, shard, config=config),
    "precomputed": lambda policy, _, shard: precomputed(policy, shard),
    "moving_average": lambda policy, config, _: moving_average(policy, config),
    "synced": lambda policy, config, _: synced(policy, config),
}


def resolve_reference_name(config: TrainConfig) -> str:
    """Return the reference's name. auto is adapter_off with a LoRA, else frozen_copy. Raises ValueError if it is unknown."""
    name = config.reference
    if name == "auto":
        name = "adapter_off" if config.tuning == "lora" else "frozen_copy"
    if name not in REFERENCES:
        raise ValueError(f"reference {name!r} is unknown; {did_you_mean(name, REFERENCES)}")
    return name


def build_reference(
    policy: Policy, config: TrainConfig, shard: Shard = None, model: nn.Module | None = None
) -> Reference:
    """Build the reference that the config names, or that of another model.

    Args:
        policy: the prepared policy.
        config: settings of the run.
        shard: function that spreads a second model over the processes.
        model: frozen model that is the reference. None: the config's.
    """
    if model is not None:
        return frozen_copy(policy, shard, model, config)
    return REFERENCES[resolve_reference_name(config)](policy, config, shard)


class WithReference:
    """Encoded rows with the reference's log-probs of chosen and rejected for each of K fixed noise samples.

    Args:
        rows: encoded rows.
        chosen, rejected: log-probs, nats, (rows, K).
        is_broken: True for rows whose image did not decode, (rows,). None: no row.
    """

    def __init__(self, rows: Any, chosen: Tensor, rejected: Tensor, is_broken: Tensor | None = None) -> None:
        self.rows, self.chosen, self.rejected, self.buckets = rows, chosen, rejected, buckets_of(rows)
        self.is_broken, self.lengths = is_broken, getattr(rows, "lengths", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        values = {"reference_chosen": self.chosen[number], "reference_rejected": self.rejected[number]}
        if self.is_broken is not None and self.is_broken[number]:
            raise missing_log_probs(self.rows, number)
        return {**self.rows[number], **values}


@torch.no_grad()
def precompute_reference_log_probs(
    policy: ImagePolicy | TextPolicy, stream: PairStream, config: TrainConfig, dropped: DroppedRows | None = None
) -> WithReference:
    """Compute the reference's log-probs of all rows at each of K fixed noise samples, once, before training.

    Batches have the size of training's. The last one of a bucket or a shard is filled with other rows. So the values equal
    those of a reference in the step, bit for bit if arithmetic does not depend on the position in a batch. Text has no noise: its
    log-probs are stored on disk for all runs, see `dpo_mm.training.reference_cache`, and several processes share the work.

    Args:
        policy: the prepared policy.
        stream: gives the rows and their fixed samples.
        config: settings of the run.
        dropped: receives rows with a broken image. None: there are none.

    Returns:
        The rows with their log-probs.
    """
    rows = stream.rows
    with progress_bar("computing reference log-probs", len(rows) * stream.num_fixed_draws) as advance:
        compute = functools.partial(_log_probs_of_part, policy, stream, config, dropped, advance)
        if policy.modality == "text":
            arithmetic = f"{config.precision}{' by autocast' if needs_autocast(config) else ''}"
            key = reference_cache.frozen_output_key("reference log-probs", policy, rows, arithmetic)
            folder = cache_folder() / "reference" / key
            return WithReference(rows, **reference_cache.load_or_compute(folder, len(rows), compute))
        return WithReference(rows, **compute(range(len(rows))))


def _log_probs_of_part(
    policy: ImagePolicy | TextPolicy,
    stream: PairStream,
    config: TrainConfig,
    dropped: DroppedRows | None,
    advance: Callable[[int], object],
    part: range,
) -> dict[str, Tensor]:
    """Log-probs of some rows, (rows, K) each, and which rows have a broken image."""
    device = next(policy.model.parameters()).device
    sides = torch.zeros(2, len(part), stream.num_fixed_draws)
    is_broken = torch.zeros(len(part), dtype=torch.bool)
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    with off, autocast(config, device.type):
        for visit in range(stream.num_fixed_draws):
            for numbers, fresh in _batches(stream.rows, config.batch_size, part):
                items = [_item(stream, number, visit, dropped) for number in numbers]
                usable = [item for item in items if item is not None]
                places = [n for n, item in enumerate(items[:fresh]) if item is not None]
                is_broken[[numbers[n] - part.start for n in range(fresh) if items[n] is None]] = True
                if places:
                    batch = policy.collate((usable * len(items))[: len(items)])
                    log_probs = policy.log_probs(policy.model, _moved(batch, device))
                    for side, values in zip(sides, (log_probs.chosen, log_probs.rejected), strict=True):
                        computed = values.float().cpu()[: len(places)]
                        side[torch.tensor([numbers[n] - part.start for n in places]), visit] = computed
                advance(fresh)
    return {"chosen": sides[0].clone(), "rejected": sides[1].clone(), "is_broken": is_broken}


def _item(stream: PairStream, number: int, visit: int, dropped: DroppedRows | None) -> dict[str, Any] | None:
    """Return a row of the stream, or None if its image is broken."""
    try:
        return stream.row_at_epoch(number, visit)
    except UndecodableImageError as error:
        if dropped is None or dropped.action == "raise":
            raise
        dropped.add(error)
        return None


def _batches(rows: Any, size: int, part: range) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of a part in full batches of one bucket each, and how many of a batch are new. The others fill it."""
    for group in buckets_of(rows):
        low, high = max(group.start, part.start), min(group.stop, part.stop)
        for start in range(low, high, size):
            numbers = [group[(n - group.start) % len(group)] for n in range(start, start + size)]
            yield numbers, min(size, high - start)


def _moved(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
