"""Pictures from a policy's stock pipeline, with a tuned adapter or denoiser attached, or its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from dpo_mm.model_loading import load_module
from dpo_mm.policies.adapters import LORA_FILE, has_lora, lora_scaled

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def load_adapter(policy: DiffusionPolicy, folder: Path) -> None:
    """Load a tuned adapter or denoiser with the stock library. Raises ValueError where there is none."""
    if (folder / LORA_FILE).exists():
        policy.pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="tuned")
    elif (folder / policy.denoiser).is_dir():
        policy.base_denoiser = policy.model
        tuned = load_module(type(policy.model), str(folder / policy.denoiser), dtype=policy.dtype)
        setattr(policy.pipe, policy.denoiser, tuned.to(policy.device))
    else:
        raise ValueError(f"adapter {str(folder)!r}: neither {LORA_FILE} nor a folder {policy.denoiser}/ there")


@torch.no_grad()
def sample(
    policy: DiffusionPolicy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int,
    scale: float = 1.0,
    sources: Sequence[Image.Image] | None = None,
) -> Iterator[list[Image.Image]]:
    """Pictures of each prompt from its own seed, a batch at a time; scale 0 draws with the base.

    sources: the picture to edit for each prompt, for families that edit. The noise of a picture comes from its seed
    alone, whatever else is in the batch. Raises ValueError where sources are missing, or not wanted.
    """
    if policy.is_image_editing != (sources is not None):
        wanted = "edits pictures; give one for each prompt" if policy.is_image_editing else "draws from text alone"
        raise ValueError(f"model {policy.source!r} is a {type(policy.pipe).__name__}, which {wanted} (sources)")
    with _scaled(policy, scale):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[part]]
            arguments = policy.sampling_kwargs(list(prompts[part]), guidance, (sources or ())[part])
            yield policy.pipe(**arguments, num_inference_steps=steps, generator=generators).images


@contextlib.contextmanager
def _scaled(policy: DiffusionPolicy, scale: float) -> Iterator[None]:
    """Within it what was attached acts with this strength. Raises ValueError between 0 and 1 for a whole denoiser."""
    if has_lora(policy.model):
        with lora_scaled(policy.model, scale):
            yield
        return
    tuned = policy.model
    if policy.base_denoiser is not None and scale not in (0.0, 1.0):
        raise ValueError(f"scale {scale}: a fully tuned denoiser has no scale but 0 and 1; sweep a LoRA instead")
    if policy.base_denoiser is not None and scale == 0:
        setattr(policy.pipe, policy.denoiser, policy.base_denoiser)
    try:
        yield
    finally:
        setattr(policy.pipe, policy.denoiser, tuned)
