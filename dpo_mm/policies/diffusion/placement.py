"""Move the components of a pipeline to the device one after the other: text encoders, autoencoder, denoiser.

Encoding needs no denoiser, and training no encoders. So the largest of the three decides how much memory a run takes, not their sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from dpo_mm.policies.adapters import pipeline_modules

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy

Encoders = Literal["text encoders", "autoencoder"]


def move(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    """Move a pipeline's modules to a device. The memory that they leave on a GPU is released."""
    for module in modules.values():
        module.to(device)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def on_device(policy: DiffusionPolicy, encoders: Encoders) -> Iterator[None]:
    """Context manager in which these encoders are on the device. Before and after, they are on the CPU.

    It does nothing if all components are on the device already (`policy.home` is None).
    """
    if policy.home is None:
        yield
        return
    modules = pipeline_modules(policy.pipe)
    del modules[policy.denoiser]
    vae = {"vae": modules.pop("vae")}
    needed = vae if encoders == "autoencoder" else modules
    move(needed, policy.home)
    try:
        yield
    finally:
        move(needed, torch.device("cpu"))
