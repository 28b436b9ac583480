"""Estimate the memory of a run on a GPU before it starts: one step on the meta device, whose tensors are counted.

Forward and backward of one batch run with the shapes and types of training on a GPU, without values. The peak equals that of the
real step, up to the allocator's rounding and the workspace of kernels. Weights, optimizer state and the frozen copy are added. The
estimate is for one process. FSDP divides everything except activations by the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean
from dpo_mm.models.quantization import LARGE_ENCODER, PACKAGES
from dpo_mm.policies.adapters import pipeline_modules
from dpo_mm.policies.diffusion.text_encoder_lora import trained_model
from dpo_mm.policies.protocol import ImagePolicy, Policy
from dpo_mm.policies.vlm.architecture import unquantized_modules
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.arrow_shards import gib
from dpo_mm.training.encoding import images_per_batch, sample_bytes
from dpo_mm.training.half_precision import autocast
from dpo_mm.training.meta_execution import CudaRules, MixedMetaMode, run_backward
from dpo_mm.training.objective_settings import is_fine_tuning, required_inputs
from dpo_mm.training.prompt_keys import example_image, example_prompt
from dpo_mm.training.reference import resolve_reference_name

NF4_TABLES = 4 * (16 + 256 + 1)
"""Bytes of the tables of a weight's values and scales, and of its offset."""


class PeakMemoryMode(TorchDispatchMode):
    """Dispatch mode that counts the bytes of living tensors made in it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before: set[int] | None = None
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
                if before is None:
                    before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
                self._count(storage, before)
        return made

    def _count(self, storage: Any, before: set[int]) -> None:
        key = id(storage)
        if key in before or key in self.known:
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
    """Bytes of a run in one process. step: peak of activations and gradients. encoding: peak before training."""

    weights: int
    reference: int
    optimizer: int
    step: int
    encoding: int

    @property
    def training(self) -> int:
        return self.weights + self.reference + self.optimizer + self.step

    @property
    def peak(self) -> int:
        return max(self.training, self.encoding)

    def describe(self) -> str:
        copy = f", frozen copy {gib(self.reference)}" if self.reference else ""
        encode = f", {gib(self.encoding)} to encode" if self.encoding else ""
        return (
            f"about {gib(self.training)} to train (weights {gib(self.weights)}{copy}, optimizer {gib(self.optimizer)}, "
            f"activations and gradients {gib(self.step)}){encode}"
        )


@dataclass(frozen=True)
class Counts:
    """Bytes that one step on the meta device takes. `Counts.memory` adds the settings that need no step.

    Attributes:
        weights: bytes of the model, not quantised.
        layers, encoder_layers: shapes of the frozen linear layers that `quantize` would store in fewer bits, in the model and
            in large text encoders.
        itemsize: bytes per weight of these layers.
        trained: shapes of the trained parameters.
        step: as in `Memory`, not quantised.
        text_encoders: bytes of an image generator's text encoders, not quantised.
        autoencoder: bytes of its autoencoder, and the peak of encoding images.
    """

    weights: int
    layers: tuple[torch.Size, ...]
    encoder_layers: tuple[torch.Size, ...]
    itemsize: int
    trained: tuple[torch.Size, ...]
    step: int
    text_encoders: int = 0
    autoencoder: int = 0

    def memory(self, config: TrainConfig) -> Memory:
        """Bytes of a run with the settings optimizer, reference and quantize of a config.

        Text encoders, autoencoder and denoiser are on the GPU one after the other.
        """
        weights, step, text_encoders = self.weights, self.step, self.text_encoders
        if quantize := config.quantize:
            saved, saved_encoders = (
                sum(self.itemsize * shape.numel() - quantized_bytes(shape, quantize) for shape in shapes)
                for shapes in (self.layers, self.encoder_layers)
            )
            weights -= saved
            text_encoders -= saved_encoders
            step += self.itemsize * max((shape.numel() for shape in self.layers), default=0)  # the layer that runs
        copies = "reference_logps" in required_inputs(config) and resolve_reference_name(config) == "frozen_copy"
        state = sum(state_bytes(shape, config.optimizer) for shape in self.trained)
        return Memory(weights, copies * weights, state, step, max(text_encoders, self.autoencoder))


def count_images(policy: ImagePolicy, config: TrainConfig) -> Counts:
    """Count the bytes of an image generator's training.

    Args:
        policy: prepared, on the meta device. It loses its encoders.
        config: settings of the run.
    """
    vae = policy.pipe.vae
    encoders = [m for m in pipeline_modules(policy.pipe).values() if m is not policy.model and m is not vae]
    layers = _linear_shapes([encoder for encoder in encoders if num_weights(encoder) >= LARGE_ENCODER])
    text_encoders, autoencoder = sum(map(_bytes, encoders)), _bytes(vae)
    with MixedMetaMode(), CudaRules(), torch.random.fork_rng(devices=[]):
        sides = ("chosen",) if is_fine_tuning(config) else ("chosen", "rejected")
        rows = [_row(policy, sides)] * config.batch_size
        with PeakMemoryMode() as encoding:
            blank = example_image(policy)
            policy.encode_images([blank] * images_per_batch(blank.size))
        policy.free_encoders()
    counts = _count_step(policy, config, rows, skip=())
    return dataclasses.replace(
        counts, encoder_layers=layers, text_encoders=text_encoders, autoencoder=autoencoder + encoding.peak
    )


def count_responses(policy: VisionLanguage, config: TrainConfig, row: dict[str, Any]) -> Counts:
    """Count the bytes of a vision-language model's training, if every row of a batch is this one.

    Args:
        policy: prepared, from `load_vlm_on_meta_device`.
        config: settings of the run.
        row: the longest row of the dataset, encoded.
    """
    skip = list(unquantized_modules(policy.base_model).values())
    return _count_step(policy, config, [row] * config.batch_size, skip=skip)


def _count_step(
    policy: Policy, config: TrainConfig, rows: list[dict[str, Any]], *, skip: Sequence[nn.Module]
) -> Counts:
    model = trained_model(policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    with MixedMetaMode(), torch.random.fork_rng(devices=[]):
        batch = policy.collate(rows)
        with CudaRules() as rules, PeakMemoryMode() as step:
            if config.accumulate > 1:  # the gradients of the pairs before
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            _step(policy, config, batch, rules)
    layers = _linear_shapes([policy.model], skip)
    frozen = next((p for p in model.parameters() if not p.requires_grad), None)
    itemsize = 4 if frozen is None else frozen.element_size()
    shapes = tuple(parameter.shape for parameter in trained)
    return Counts(_bytes(model), layers, (), itemsize, shapes, step.peak)


def _linear_shapes(models: Sequence[nn.Module], skip: Sequence[nn.Module] = ()) -> tuple[torch.Size, ...]:
    """Shapes of the frozen weights of linear layers, except those inside the modules to skip."""
    left_out = {id(module) for part in skip for module in part.modules()}
    return tuple(
        module.weight.shape
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module) not in left_out
    )


def num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def disk_bytes(policy: ImagePolicy, config: TrainConfig) -> tuple[int, int]:
    """Bytes of an encoded dataset on disk, per prompt and per pair. The policy is on the meta device."""
    with MixedMetaMode(), CudaRules():
        sides = 1 if is_fine_tuning(config) else 2
        return sample_bytes(
            policy, config.cache_precision, sides=sides, with_source=policy.is_image_editing, flipped=config.random_flip
        )


def _row(policy: ImagePolicy, sides: Sequence[str] = ("chosen", "rejected")) -> dict[str, Any]:
    """Make an encoded row with the policy's shapes."""
    blank = [example_image(policy)]
    prompt = {name: value[0] for name, value in example_prompt(policy).items()}
    mean, std = policy.encode_images(blank)
    row: dict[str, Any] = {"id": "a row", "visit": 0, "prompt": prompt}
    for side in sides:
        row |= {f"{side}_mean": mean[0], f"{side}_std": std[0]}
        row |= {f"{side}_{name}": fact[0] for name, fact in policy.size_conditioning(blank).items()}
    return row | ({"source_mean": policy.encode_sources(blank)[0]} if policy.is_image_editing else {})


def _step(policy: Policy, config: TrainConfig, batch: dict[str, Any], rules: CudaRules | None = None) -> None:
    """Run the trainer's forward and backward: the reference first, without activations, then the policy."""
    policy.model.train()
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    batches = [batch, *([batch["corrupted"]] if "corrupted" in batch else [])]
    half = lambda: autocast(config, "cpu")
    stored = rules.storing_casts if rules else contextlib.nullcontext
    reference = resolve_reference_name(config)
    if reference != "precomputed" and "reference_logps" in required_inputs(config):
        with half(), contextlib.nullcontext() if reference == "frozen_copy" else stored(), torch.no_grad(), off:
            for part in batches:
                policy.log_probs(policy.model, part)
    with half(), stored():
        log_probs = [policy.log_probs(policy.model, part) for part in batches]
    run_backward(torch.stack([part.chosen.sum() - part.rejected.sum() for part in log_probs]).sum())


def state_bytes(shape: Sequence[int], optimizer: str) -> int:
    """Bytes of an optimizer's state for one parameter.

    adamw: two float32 values. adamw_8bit: two bytes, and one scale per 256 of them; small tensors in float32 (Dettmers et al. 2021,
    2110.02861). adafactor: one float32 value per row and per column (Shazeer and Stern 2018, 1804.04235).
    """
    count = torch.Size(shape).numel()
    if optimizer == "adafactor" and len(shape) > 1:
        return 4 * (count // shape[-1] + count // shape[-2])
    if optimizer in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit") and count >= 4096:
        return 2 * count + 2 * 4 * -(-count // 256)
    return 8 * count if optimizer != "adafactor" else 4 * count


def quantized_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a quantised weight with its scales.

    nf4: half a byte per weight, an 8-bit scale per 64 weights, a float32 scale per 256 of these, and two tables (Dettmers et al.
    2023, 2305.14314, double quantisation). int8 and fp8: one byte per weight, and one float32 scale per row.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in PACKAGES:
        raise ValueError(f"quantize {kind!r} is unknown; {did_you_mean(kind, PACKAGES)}")
    count = torch.Size(shape).numel()
    if kind == "nf4":
        blocks = -(-count // 64)
        return -(-count // 2) + blocks + 4 * -(-blocks // 256) + NF4_TABLES
    return count + 4 * shape[0]


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
