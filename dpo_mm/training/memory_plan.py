"""Lines on memory in a run's plan: what it takes, if that fits a GPU, and which change of its settings makes it fit."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dpo_mm.assets import resolve_asset
from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm.meta_model import load_vlm_on_meta_device
from dpo_mm.training.arrow_shards import gib
from dpo_mm.training.builders import build_policy
from dpo_mm.training.memory_estimate import Counts, Memory, count_images, count_responses, disk_bytes
from dpo_mm.training.objective_settings import required_inputs

logger = logging.getLogger(__name__)

USABLE = 0.95
"""Part of a GPU's memory that tensors can take. The rest is for CUDA's context, workspaces and fragments."""
GIB = 2**30
Count = Callable[[TrainConfig], Counts]
"""Counts the bytes of a run with these settings."""


def card_size(vram: float | None) -> float | None:
    """Memory of a GPU in GB of 2^30 bytes: `vram`, or that of the GPU at hand. None if there is none."""
    if vram is not None or not torch.cuda.is_available():
        return vram
    return torch.cuda.get_device_properties(0).total_memory / GIB


def image_lines(config: TrainConfig, prompts: int, pairs: int, *, vram: float | None) -> dict[str, str]:
    """Lines on memory and disk of an image generator's run.

    Args:
        config: settings of the run.
        prompts, pairs: their numbers in the dataset.
        vram: as in `memory_lines`.
    """
    per_prompt, per_pair = disk_bytes(build_policy(dataclasses.replace(config, quantize=None), weights=False), config)  # type: ignore[arg-type]
    disk = per_prompt * prompts + per_pair * pairs
    lines = memory_lines(config, _count_image_run, vram=vram, fixed_draws=True)
    return lines | {"disk": f"about {gib(disk)} for {pairs:,} pairs of {prompts:,} prompts, encoded"}


def _count_image_run(config: TrainConfig) -> Counts:
    policy = build_policy(config, weights=False)
    assert policy.modality == "image"
    policy.prepare(config)
    return count_images(policy, config)


def response_lines(config: TrainConfig, row: dict[str, Any], *, vram: float | None) -> dict[str, str]:
    """Lines on the memory of a vision-language model's run.

    Args:
        config: settings of the run.
        row: the longest row of the dataset, encoded.
        vram: as in `memory_lines`.
    """

    def count(changed: TrainConfig) -> Counts:
        policy = load_vlm_on_meta_device(
            resolve_asset(changed.model),
            revision=changed.revision,
            precision=changed.precision if changed.tuning == "lora" else "fp32",
            train_vision_tower=changed.train_vision_tower,
            pair_layout=changed.pair_layout,
        )
        policy.prepare(changed)
        return count_responses(policy, changed, row)

    return memory_lines(config, count, vram=vram)


def memory_lines(config: TrainConfig, count: Count, *, vram: float | None, fixed_draws: bool = False) -> dict[str, str]:
    """Lines `memory` and, if there is a GPU to compare with, `fits` of a run's plan.

    Args:
        config: settings of the run.
        count: counts the bytes of a run.
        vram: memory of the GPU in GB of 2^30 bytes. None: that of the GPU at hand.
        fixed_draws: the run's precomputed references need fixed draws, as an image generator's do.

    Returns:
        The lines. None for a model that does not run on the meta device.

    Raises:
        ValueError: if vram is not above 0.
    """
    if vram is not None and not vram > 0:
        raise ValueError(f"vram is {vram:g}. Expected the GPU's memory in GB, above 0")
    estimate = _estimator(count)
    try:
        memory, size = estimate(config), card_size(vram)
    except (RuntimeError, TypeError, AttributeError) as error:  # of an operation without a version for the meta device
        logger.info("%s: memory cannot be counted (%s)", config.model, error)
        return {}
    lines = {"memory": memory.describe()}
    return lines if size is None else lines | {"fits": _verdict(config, estimate, memory, size, fixed_draws)}


def _estimator(count: Count) -> Callable[[TrainConfig], Memory]:
    """Estimate of a run's memory, which counts once per set of settings that need another step."""
    counted: dict[tuple[Any, ...], Counts] = {}

    def estimate(config: TrainConfig) -> Memory:
        key = (config.gradient_checkpointing, config.batch_size, config.accumulate > 1)
        if key not in counted:
            counted[key] = count(dataclasses.replace(config, quantize=None))
        return counted[key].memory(config)

    return estimate


def _verdict(
    config: TrainConfig, estimate: Callable[[TrainConfig], Memory], memory: Memory, size: float, fixed_draws: bool
) -> str:
    """Say if a run fits a card of this size, and if not, what makes it fit."""
    card, limit = f"{size:.0f} GB", USABLE * size * GIB
    if memory.peak <= limit:
        return f"fits {card}, takes {_gb(memory)}"
    tried = "no other setting was found that takes less"
    for changes in possible_changes(config, fixed_draws=fixed_draws):
        smaller = estimate(dataclasses.replace(config, **changes))
        if smaller.peak <= limit:
            return f"does not fit {card}; with {_settings(changes)} it takes {_gb(smaller)}"
        tried = f"with {_settings(changes)} it still takes {_gb(smaller)}"
    return f"does not fit {card}, takes {_gb(memory)}; {tried}"


def _gb(memory: Memory) -> str:
    return f"{memory.peak / GIB:.1f} GB"


def _settings(changes: dict[str, Any]) -> str:
    texts = [f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items()]
    return ", ".join(texts[:-1]) + (" and " if texts[:-1] else "") + texts[-1]


def possible_changes(config: TrainConfig, *, fixed_draws: bool = False) -> Iterator[dict[str, Any]]:
    """Yield changes of settings that take less memory: single ones, the cheapest first, then combinations."""
    single: list[dict[str, Any]] = []
    if not config.gradient_checkpointing:
        single.append({"gradient_checkpointing": True})
    smallest = 2 if config.antithetic_noise else 1
    if config.batch_size > smallest and config.batch_size % smallest == 0:
        factor = config.batch_size // smallest
        single.append({"batch_size": smallest, "accumulate": factor * config.accumulate})
    if config.tuning == "full":
        if config.reference in ("auto", "frozen_copy") and "reference_logps" in required_inputs(config):
            draws = {"fixed_draws_per_row": 1} if fixed_draws and not config.fixed_draws_per_row else {}
            single.append({"reference": "precomputed", **draws})
        if config.optimizer in ("adamw", "adamw_torch", "adamw_torch_fused"):
            single.append({"optimizer": "adamw_8bit"})
    elif config.quantize is None:
        single.append({"quantize": "nf4"})
    for number in range(1, len(single) + 1):
        for chosen in itertools.combinations(single, number):
            yield {name: value for change in chosen for name, value in change.items()}
