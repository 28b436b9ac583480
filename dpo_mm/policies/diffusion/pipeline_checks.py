"""Checks of a pipeline: its components, and the inputs of its UNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_components(source: str, names: Sequence[str]) -> None:
    """Raise ValueError if a pipeline's folder lacks one of these components. A hub id is not checked."""
    for part in names:
        if Path(source).is_dir() and not (Path(source) / part).is_dir():
            raise ValueError(
                f"model {source!r} has no {part}. Expected the folder {part}/ that `pipe.save_pretrained` writes"
            )


def check_resolution(resolution: int, *, multiple: int, source: str) -> None:
    """Raise ValueError unless a resolution is a multiple of this number of pixels."""
    if resolution <= 0 or resolution % multiple:
        raise ValueError(f"resolution {resolution} is not supported: {source!r} takes multiples of {multiple}")


def check_unet(pipe: Any, source: str, *, is_image_editing: bool) -> None:
    """Raise ValueError for a UNet that needs more inputs than latents, timestep, prompt, and the latents of an image to edit."""
    unet = getattr(pipe, "unet", None)
    if unet is None:
        return
    channels, latents = unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents * (1 + is_image_editing):
        reason = (
            "twice as many, with the image to edit"
            if is_image_editing
            else "as many. Inpainting UNets are not supported"
        )
        raise ValueError(
            f"model {source!r}: its UNet takes {channels} input channels, but the autoencoder's latents have {latents}. "
            f"{type(pipe).__name__} needs {reason}"
        )
    if unet.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"model {source!r}: its UNet takes a guidance embedding (time_cond_proj_dim), as LCM's. It is not supported: "
            "train the model that it was distilled from"
        )
