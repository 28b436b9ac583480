"""Pipelines without weights: every module has its real shape and type, built only from the config files.

The modules are on the meta device, where tensors have shapes but no numbers. So the memory of a model can be counted on a machine
that is too small for it, see `training/meta_execution.py`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from dpo_mm.models.meta_device import meta_device
from dpo_mm.models.model_loading import check_libraries, is_number_list, load_part

UNUSED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder", "pe", "pe_tokenizer")
"""Components that training never needs."""
MAX_REAL_BUFFER = 2**16
"""Largest number of elements of a buffer that gets real zeros."""


def load_on_meta_device(source: str, *, revision: str | None, dtype: torch.dtype) -> Any:
    """Build a pipeline of its diffusers class on the meta device.

    Args:
        source: a pipeline folder or hub id.
        revision: a branch, tag or commit of a hub model.
        dtype: type of the modules' parameters.

    Raises:
        ValueError: if a component's class is from neither diffusers nor transformers.
    """
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    check_libraries(index, source)
    pipeline_class = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = {}
    for name in set(inspect.signature(pipeline_class.__init__).parameters) & set(index):
        entry = index[name]
        if not isinstance(entry, list) or is_number_list(entry):
            parts[name] = entry
        elif entry[0] is None or name in UNUSED_COMPONENTS:
            parts[name] = None
        else:
            parts[name] = _build_component(source, name, *entry, revision=revision, dtype=dtype)
    if "requires_safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return pipeline_class(**parts)


def _build_component(
    source: str, name: str, library: str, class_name: str, *, revision: str | None, dtype: torch.dtype
) -> Any:
    """Build a module on the meta device, or load a component that is no module (tokenizer, scheduler)."""
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"model {source!r}: {name} comes from {library!r}. Expected diffusers or transformers")
    component_class = getattr(importlib.import_module(library), class_name)
    if not issubclass(component_class, nn.Module):
        return load_part(component_class, source, name=f"model {source!r}, {name}", subfolder=name, revision=revision)
    if library == "diffusers":
        config = component_class.load_config(source, subfolder=name, revision=revision)
        with meta_device():
            module = component_class.from_config(config)
        return fill_small_buffers(module.to(dtype))
    config = load_part(
        component_class.config_class, source, name=f"model {source!r}, {name}", subfolder=name, revision=revision
    )
    with meta_device():
        module = component_class(config)
    module.tie_weights()
    return fill_small_buffers(module.to(dtype).eval())


def fill_small_buffers(module: nn.Module) -> nn.Module:
    """Give a meta module zeros for its small buffers, which some families read (a batch norm's statistics)."""
    for submodule in module.modules():
        for name, buffer in submodule._buffers.items():
            if buffer is not None and buffer.numel() <= MAX_REAL_BUFFER:
                submodule._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return module
