"""Images to edit of prompts: passed to a model that edits, and refused before anything is generated if they do not fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.row_paths import LONGEST_SHOWN
from dpo_mm.policies.protocol import ImagePolicy

MAX_SOURCES = 1
"""Images to edit per prompt that the pipelines of the families take."""


class ImagesToEdit(TypedDict, total=False):
    """Keyword arguments of `ImagePolicy.sample`."""

    sources: LazyImages


def images_to_edit(sources: Sequence[LazyImages]) -> ImagesToEdit:
    """Return the argument `sources` of `ImagePolicy.sample`, or none if the prompts have no images to edit."""
    return {"sources": LazyImages([images.loaders[0] for images in sources])} if any(sources) else {}


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
        if len(images) > MAX_SOURCES:
            raise ValueError(f"{prompt}: {len(images)} images to edit, but {pipeline} takes {MAX_SOURCES}. Remove some")
        if images and images.file_hashes not in decoded:
            decoded.add(images.file_hashes)
            list(images)
