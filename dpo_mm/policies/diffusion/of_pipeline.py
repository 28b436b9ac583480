"""Make a policy of a diffusers pipeline whose components are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dpo_mm.policies.adapters import pipeline_modules
from dpo_mm.policies.diffusion.pipeline_checks import check_resolution, check_unet
from dpo_mm.policies.diffusion.placement import move

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


P = TypeVar("P", bound="DiffusionPolicy")


def policy_of_pipeline(
    family: type[P],
    pipe: Any,
    source: str,
    *,
    device: str | None = None,
    resolution: int | None = None,
    weights: bool = True,
    one_at_a_time: bool = False,
) -> P:
    """Make a policy of a loaded pipeline. The arguments are those of `DiffusionPolicy.load`.

    Raises:
        ValueError: if its UNet or the resolution is not supported.
    """
    pipe.set_progress_bar_config(disable=True)
    home = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if weights:
        move(pipeline_modules(pipe), torch.device("cpu") if one_at_a_time else home)
    check_unet(pipe, source, is_image_editing=family.is_image_editing)
    policy = family(pipe, source)
    policy.home = home if weights and one_at_a_time else None
    if resolution is not None:
        check_resolution(resolution, multiple=pipe.vae_scale_factor * family.patch, source=source)
        policy.resolution = resolution
    return policy
