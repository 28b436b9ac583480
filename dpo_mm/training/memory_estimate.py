"""Estimate the memory of a run before it starts, from one step on fake tensors whose storages are counted.

Forward and backward of one batch run with the shapes and types of training, without values. The peak equals that of the real
step, up to the allocator's rounding and the workspace of kernels. Weights, optimizer state and the frozen copy are added. The
estimate is for one process. FSDP divides everything except activations by the number of processes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.meta_pipeline import to_fake_tensors
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.training.arrow_shards import gib
from dpo_mm.training.encoding import images_per_batch, sample_bytes
from dpo_mm.training.reference import resolve_reference_name

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PeakMemoryMode(TorchDispatchMode):
    """Dispatch mode that counts the bytes of living tensors made in it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), before)
        return made

    def _count(self, storage: Any, before: set[int]) -> None:
        key = id(storage)
        if key in self.known or key in before:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self.known[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


@dataclass(frozen=True)
class Memory:
    """Bytes of a run in one process. step: peak of activations and gradients. encoding: total before training."""

    weights: int
    reference: int
    optimizer: int
    step: int
    encoding: int

    @property
    def training(self) -> int:
        return self.weights + self.reference + self.optimizer + self.step

    def describe(self) -> str:
        copy = f", frozen copy {gib(self.reference)}" if self.reference else ""
        return (
            f"about {gib(self.training)} to train (weights {gib(self.weights)}{copy}, optimizer {gib(self.optimizer)}, "
            f"activations and gradients {gib(self.step)}), {gib(self.encoding)} to encode"
        )


def estimate_memory_and_disk(policy: ImagePolicy, config: TrainConfig, prompts: int, pairs: int) -> dict[str, str]:
    """Lines `memory` and `disk` of a run's plan.

    Args:
        policy: prepared, on the meta device.
        config: settings of the run.
        prompts, pairs: their numbers in the dataset.

    Returns:
        The lines. Memory is unknown for a family that reads the values of its tensors, such as the lengths of prompts.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        memory, (a_prompt, a_pair) = count_bytes(policy, config)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return {}
    disk = a_prompt * prompts + a_pair * pairs
    return {
        "memory": memory.describe(),
        "disk": f"about {gib(disk)} for {pairs:,} pairs of {prompts:,} prompts, encoded",
    }


def count_bytes(policy: ImagePolicy, config: TrainConfig) -> tuple[Memory, tuple[int, int]]:
    """Bytes of memory that a run takes, and bytes on disk per prompt and per pair."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    modules = [part for part in policy.pipe.components.values() if isinstance(part, nn.Module)]
    everything = sum(_bytes(module) for module in modules)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        for module in modules:
            to_fake_tensors(module)
        disk = sample_bytes(policy, config.cache_precision)
        rows = [_row(policy)] * config.batch_size
        with PeakMemoryMode() as encoding:
            size = policy.resolution
            policy.encode_images([Image.new("RGB", (size, size))] * images_per_batch((size, size)))
        policy.free_encoders()
        with PeakMemoryMode() as step:
            _step(policy, config, policy.collate(rows))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    weights = _bytes(policy.model)
    copies = resolve_reference_name(config) == "frozen_copy"
    state = sum(state_bytes(p.shape, config.optimizer) for p in trained)
    return Memory(weights, copies * weights, state, step.peak, everything + encoding.peak), disk


def _row(policy: ImagePolicy) -> dict[str, Any]:
    """Make an encoded row with the policy's shapes."""
    blank = [Image.new("RGB", (policy.resolution, policy.resolution))]
    prompt = {name: value[0] for name, value in policy.encode_prompts(["a picture"]).items()}
    mean, std = policy.encode_images(blank)
    row: dict[str, Any] = {"id": "a row", "visit": 0, "prompt": prompt}
    for side in ("chosen", "rejected"):
        row |= {f"{side}_mean": mean[0], f"{side}_std": std[0]}
        row |= {f"{side}_{name}": fact[0] for name, fact in policy.size_conditioning(blank).items()}
    return row | ({"source_mean": mean[0]} if policy.is_image_editing else {})


def _step(policy: ImagePolicy, config: TrainConfig, batch: dict[str, Any]) -> None:
    """Run the trainer's forward and backward: the reference first, without activations, then the policy."""
    policy.model.train()
    kind = AUTOCAST.get(config.precision)
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    with torch.autocast("cpu", dtype=kind or torch.bfloat16, enabled=kind is not None):
        if resolve_reference_name(config) != "precomputed":
            with torch.no_grad(), off:
                policy.log_probs(policy.model, batch)
        log_probs = policy.log_probs(policy.model, batch)
    (log_probs.chosen - log_probs.rejected).sum().backward()


def state_bytes(shape: Sequence[int], optimizer: str) -> int:
    """Bytes of an optimizer's state for one parameter.

    adamw: two float32 values. adamw_8bit: two bytes, and one scale per 256 of them; small tensors in float32 (Dettmers et al. 2021,
    2110.02861). adafactor: one float32 value per row and per column (Shazeer and Stern 2018, 1804.04235).
    """
    count = torch.Size(shape).numel()
    if optimizer == "adafactor" and len(shape) > 1:
        return 4 * (count // shape[-1] + count // shape[-2])
    if optimizer == "adamw_8bit" and count >= 4096:
        return 2 * count + 2 * 4 * -(-count // 256)
    return 8 * count if optimizer != "adafactor" else 4 * count


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
