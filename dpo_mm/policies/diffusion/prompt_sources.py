"""Images to edit of prompts: passed to a model that edits, and refused before anything is generated if they do not fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from torch import Tensor

from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.row_paths import LONGEST_SHOWN
from dpo_mm.policies.protocol import ImagePolicy


class ImagesToEdit(TypedDict, total=False):
    """Keyword arguments of `ImagePolicy.sample`."""

    sources: Sequence[LazyImages]


def source_name(number: int) -> str:
    """Name of the latents of an image to edit in encoded prompts: source, source_2, source_3 and so on."""
    return f"source_{number + 1}" if number else "source"


def source_latents(prompt: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the latents of the images to edit of encoded prompts, (images, channels, h, w) each. None for a prompt without one."""
    latents: list[Tensor] = []
    while (name := source_name(len(latents))) in prompt:
        latents.append(prompt[name])
    return latents


def images_to_edit(sources: Sequence[LazyImages]) -> ImagesToEdit:
    """Return the argument `sources` of `ImagePolicy.sample`, or none if the prompts have no images to edit."""
    return {"sources": sources} if any(sources) else {}


def check_prompt_sources(policy: ImagePolicy, name: str, prompts: Sequence[str], sources: Sequence[LazyImages]) -> None:
    """Check that prompts have an image to edit if, and only if, the model edits images.

    A model that edits optionally takes lists in which all prompts have one, or none.

    Args:
        policy: the image generator.
        name: name of the prompt list, for errors.
        prompts: texts.
        sources: images to edit of each prompt. Empty: they have none.

    Raises:
        ValueError: if a prompt has too few or too many images, or one does not decode. It names the prompt or its row.
    """
    pipeline, decoded = type(policy.pipe).__name__, set()
    is_editing = any(sources) if policy.edits_optionally else policy.is_image_editing
    for text, images in zip(prompts, sources or [LazyImages(())] * len(prompts), strict=True):
        prompt = f"prompts {name!r}, prompt {text[:LONGEST_SHOWN]!r}"
        if is_editing and not images:
            reason = "another prompt has" if policy.edits_optionally else f"{pipeline} edits"
            raise ValueError(f"{prompt}: no image. {reason} an image to edit, so every prompt needs one in image")
        if images and not is_editing:
            raise ValueError(
                f"{prompt}: it has an image to edit, which {pipeline} does not take. Use a model that edits, or prompts "
                "without images"
            )
        if len(images) > 1 and not policy.takes_several_sources:
            raise ValueError(f"{prompt}: {len(images)} images to edit, but {pipeline} takes 1. Remove some")
        if images and images.file_hashes not in decoded:
            decoded.add(images.file_hashes)
            list(images)
