"""A pipeline without its weights: every module of its real shape and type, from the config files alone.

Its modules are on the meta device; with `fake` they compute fake tensors, which have shapes and no numbers, so that memory
can be counted for a model that this machine could not hold.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that no training needs."""
SMALL = 2**16


def load_on_meta_device(source: str, *, revision: str | None, dtype: torch.dtype) -> Any:
    """A pipeline folder or hub id as its stock class, on the meta device. Raises ValueError for a part of other make."""
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    kind = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = {}
    for name in set(inspect.signature(kind.__init__).parameters) & set(index):
        entry = index[name]
        if not isinstance(entry, list):
            parts[name] = entry
        elif entry[0] is None or name in LEFT_OUT:
            parts[name] = None
        else:
            parts[name] = _part(source, name, *entry, revision=revision, dtype=dtype)
    if "requires_safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return kind(**parts)


def _part(source: str, name: str, library: str, kind: str, *, revision: str | None, dtype: torch.dtype) -> Any:
    """One component: a module on the meta device, anything else (tokenizers, the scheduler) as it is."""
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"model {source!r}: {name} comes from {library!r}; expected diffusers or transformers")
    made = getattr(importlib.import_module(library), kind)
    if not issubclass(made, nn.Module):
        return made.from_pretrained(source, subfolder=name, revision=revision)
    if library == "diffusers":
        config = made.load_config(source, subfolder=name, revision=revision)
        with torch.device("meta"):
            return _with_buffers(made.from_config(config).to(dtype))
    config = made.config_class.from_pretrained(source, subfolder=name, revision=revision)
    with torch.device("meta"):
        return _with_buffers(made(config).to(dtype).eval())


def _with_buffers(module: nn.Module) -> nn.Module:
    """A module of the meta device with zeros for its small buffers, which some families read (a batch norm's)."""
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.numel() <= SMALL:
                each._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return module


def fake(module: nn.Module) -> None:
    """Within a FakeTensorMode, give a module of the meta device fake parameters and buffers; what is shared stays so."""
    made: dict[int, Any] = {}
    for each in module.modules():
        for name, tensor in each._parameters.items():
            if tensor is not None and id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad)
            each._parameters[name] = None if tensor is None else made[id(tensor)]
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
