"""Generate images with a policy's pipeline, with a loaded adapter or denoiser or with the base model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from dpo_mm.data.clips import clip_image
from dpo_mm.data.image_files import to_rgb
from dpo_mm.models.model_checks import SAVE_AGAIN, check_finite, read_config
from dpo_mm.models.model_loading import load_module
from dpo_mm.models.quantization import refuse_whole_model
from dpo_mm.policies.adapter_checks import ADAPTER_FILE
from dpo_mm.policies.adapter_sources import START_FOLDER, lora_file
from dpo_mm.policies.adapters import (
    LORA_FILE,
    at_lora_scale,
    attach_lora,
    attach_peft,
    lora_models,
    merge_pipeline,
    pipeline_modules,
)
from dpo_mm.policies.diffusion.pipeline_checks import check_unet

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy

INDEX_FILE = "model_index.json"


def load_adapter(policy: DiffusionPolicy, folder: Path) -> None:
    """Load a trained LoRA, denoiser or pipeline with diffusers. A LoRA may also reach the text encoders.

    Args:
        policy: the base.
        folder: the trained weights, or one file of a LoRA. An adapter below them (START_FOLDER) is merged into the base first.

    Raises:
        ValueError: if the folder contains none of them, or it does not fit the model.
    """
    if (folder / START_FOLDER).is_dir():
        load_adapter(policy, folder / START_FOLDER)
        merge_pipeline(policy.pipe)
    if (folder / ADAPTER_FILE).exists():
        attach_peft(policy.model, folder)
    elif (folder / INDEX_FILE).exists():
        refuse_whole_model(policy.model, folder)
        policy.base_pipe, policy.pipe = policy.pipe, _load_pipeline(policy, folder)
    elif (folder / policy.denoiser).is_dir():
        refuse_whole_model(policy.model, folder)
        policy.base_pipe = copy.copy(policy.pipe)
        tuned = load_module(type(policy.model), str(folder / policy.denoiser), dtype=policy.dtype)
        check_finite({"": tuned}, f"adapter {str(folder)!r}")
        setattr(policy.pipe, policy.denoiser, tuned.to(policy.device))
    elif (file := lora_file(folder)) is not None:
        if not hasattr(policy.pipe, "load_lora_weights"):
            raise ValueError(
                f"adapter {str(folder)!r}: {type(policy.pipe).__name__} takes adapters in PEFT's format only"
            )
        attach_lora(policy.pipe, file)
        if not lora_models(policy.pipe):
            raise ValueError(f"adapter {str(folder)!r}: no weight in {file.name} fits {policy.source!r}")
    else:
        raise ValueError(f"adapter {str(folder)!r} contains neither {LORA_FILE} nor a folder {policy.denoiser}/")


def _load_pipeline(policy: DiffusionPolicy, folder: Path) -> Any:
    """Load a tuned pipeline. Raises ValueError unless its class is that of the policy's pipeline."""
    expected, tuned_class = (
        type(policy.pipe).__name__,
        read_config(folder / INDEX_FILE, fix=SAVE_AGAIN).get("_class_name"),
    )
    if tuned_class != expected:
        raise ValueError(
            f"adapter {str(folder)!r} is a {tuned_class}, but the model {policy.source!r} is a {expected}. "
            "Compare two pipelines of the same class"
        )
    pipe = type(policy).open(str(folder), revision=None, dtype=policy.dtype)
    check_unet(pipe, str(folder), is_image_editing=policy.is_image_editing)
    check_finite(pipeline_modules(pipe), f"adapter {str(folder)!r}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(policy.device)


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
    sources: Sequence[Sequence[Image.Image]] | None = None,
) -> Iterator[list[Image.Image]]:
    """Generate one image per prompt and seed, a batch at a time. See `ImagePolicy.sample` for the arguments.

    Raises:
        ValueError: if sources are missing, too many or not supported, or the scale is not supported.
    """
    if policy.is_image_editing != (sources is not None) and not policy.edits_optionally:
        reason = "needs an image to edit per prompt" if policy.is_image_editing else "takes no images to edit"
        raise ValueError(f"model {policy.source!r} is a {type(policy.pipe).__name__}, which {reason} (sources)")
    if sources is not None and not policy.takes_several_sources and any(len(images) > 1 for images in sources):
        raise ValueError(
            f"model {policy.source!r} is a {type(policy.pipe).__name__}, which takes one image to edit (sources)"
        )
    if policy.one_prompt_per_call or (sources is not None and policy.edits_optionally):
        batch_size = 1
    with policy.at_scale(scale):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[part]]
            arguments = policy.sampling_kwargs(list(prompts[part]), guidance, (sources or ())[part])
            output = policy.pipe(**arguments, num_inference_steps=steps, generator=generators)
            images = output.images if policy.frames == 1 else [clip_image(frames) for frames in output.frames]
            yield [to_rgb(image) for image in images]


@contextlib.contextmanager
def at_scale(policy: DiffusionPolicy, scale: float) -> Iterator[None]:
    """Context manager that sets the weight of what `load_adapter` loaded. See `ImagePolicy.at_scale`."""
    if policy.base_pipe is not None and scale not in (0.0, 1.0):
        raise ValueError(f"scale {scale}: a fully tuned denoiser supports only the scales 0 and 1. Use a LoRA instead")
    tuned = policy.pipe
    if policy.base_pipe is not None and scale == 0:
        policy.pipe = policy.base_pipe
    try:
        with at_lora_scale(lora_models(policy.pipe), scale):
            yield
    finally:
        policy.pipe = tuned
