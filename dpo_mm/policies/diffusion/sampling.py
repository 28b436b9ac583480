"""Generate images with a policy's pipeline, with a loaded adapter or denoiser or with the base model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from dpo_mm.model_loading import load_module
from dpo_mm.policies.adapters import LORA_FILE, at_lora_scale, has_lora

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def load_adapter(policy: DiffusionPolicy, folder: Path) -> None:
    """Load a trained adapter or denoiser with diffusers.

    Raises:
        ValueError: if the folder contains neither.
    """
    if (folder / LORA_FILE).exists():
        policy.pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="tuned")
    elif (folder / policy.denoiser).is_dir():
        policy.base_denoiser = policy.model
        tuned = load_module(type(policy.model), str(folder / policy.denoiser), dtype=policy.dtype)
        setattr(policy.pipe, policy.denoiser, tuned.to(policy.device))
    else:
        raise ValueError(f"adapter {str(folder)!r} contains neither {LORA_FILE} nor a folder {policy.denoiser}/")


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
    """Generate one image per prompt and seed, a batch at a time. See `ImagePolicy.sample` for the arguments.

    Raises:
        ValueError: if sources are missing or not supported, or the scale is not supported.
    """
    if policy.is_image_editing != (sources is not None):
        reason = "needs an image to edit per prompt" if policy.is_image_editing else "takes no images to edit"
        raise ValueError(f"model {policy.source!r} is a {type(policy.pipe).__name__}, which {reason} (sources)")
    with _at_scale(policy, scale):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[part]]
            arguments = policy.sampling_kwargs(list(prompts[part]), guidance, (sources or ())[part])
            yield policy.pipe(**arguments, num_inference_steps=steps, generator=generators).images


@contextlib.contextmanager
def _at_scale(policy: DiffusionPolicy, scale: float) -> Iterator[None]:
    """Context manager that sets the weight of what `load_adapter` loaded. A whole denoiser supports only 0 and 1."""
    if has_lora(policy.model):
        with at_lora_scale(policy.model, scale):
            yield
        return
    tuned = policy.model
    if policy.base_denoiser is not None and scale not in (0.0, 1.0):
        raise ValueError(f"scale {scale}: a fully tuned denoiser supports only the scales 0 and 1. Use a LoRA instead")
    if policy.base_denoiser is not None and scale == 0:
        setattr(policy.pipe, policy.denoiser, policy.base_denoiser)
    try:
        yield
    finally:
        setattr(policy.pipe, policy.denoiser, tuned)
