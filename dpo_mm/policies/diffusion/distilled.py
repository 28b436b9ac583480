"""Models that were distilled to a few steps, and the models to train in their place."""

from __future__ import annotations

import re
from typing import Any

BASES = {
    "sd-turbo": "stabilityai/stable-diffusion-2-1",
    "sdxl-turbo": "stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-schnell": "black-forest-labs/FLUX.1-dev",
    "flux.2-klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux.2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "z-image-turbo": "Tongyi-MAI/Z-Image",
    "ernie-image-turbo": "baidu/ERNIE-Image",
    "krea-2-turbo": "krea/Krea-2-Raw",
    "chroma1-flash": "lodestones/Chroma1-Base",
    "hidream-i1-dev": "HiDream-ai/HiDream-I1-Full",
    "hidream-i1-fast": "HiDream-ai/HiDream-I1-Full",
}
"""Model to train instead of a distilled one, by the last part of its hub id in small letters."""
WORDS = re.compile(r"(?<![a-z])(turbo|schnell|lightning|lcm)(?![a-z])")
"""Words in the name of a distilled model that is not in BASES."""


def describe_distillation(pipe: Any, source: str) -> str:
    """Say that a model is distilled, and what to train instead. "" if neither its name nor its config says so.

    Args:
        pipe: the pipeline.
        source: its folder or hub id.
    """
    name = source.rstrip("/").rpartition("/")[2]
    base = next((base for key, base in BASES.items() if name.lower().startswith(key)), None)
    if base is None and not WORDS.search(name.lower()) and not pipe.config.get("is_distilled"):
        return ""
    instead = base or "the model that it was distilled from"
    return f"{name} was distilled to a few steps, which training undoes. Train {instead}, and compare on {name} too"
