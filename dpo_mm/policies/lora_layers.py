"""LoRA layers of a model with an attached adapter: train it next to a frozen copy of itself, or merge it into the weights.

The functions work on models of diffusers and transformers, because PEFT's layers are the same in both.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mm.models.quantization import is_quantized

TRAINED, FROZEN = "default", "reference"
"""Names of the adapter that trains and of its frozen copy."""
OFF: tuple[str, Any, Any] = ("_disable_adapters", True, False)
"""Attribute of a layer of PEFT that turns its adapter off, with its values for the reference and the policy."""
LAYER_STATE = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "lora_variant")
LAYER_WEIGHTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

_layers_of: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""LoRA layers of models whose reference has run."""


def lora_layers(model: nn.Module) -> list[Any]:
    """Return the modules of a model that have a LoRA."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


class InputTypeLinear(nn.Linear):
    """A linear layer with float32 weights that computes in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


def train_in_float32(model: nn.Module) -> None:
    """Make the trained weights float32, and compute a LoRA's products in the type of the layer's input.

    PEFT would cast each input to float32 instead. A LoRA's weights are much smaller than its inputs, and layers with the same
    input, such as queries, keys and values, would each store a copy of it for the backward pass. The results are those of autocast.
    Layers of DoRA, embeddings and convolutions stay PEFT's.

    Args:
        model: a model of diffusers or transformers.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in lora_layers(model):
        parts = [part for weights in (layer.lora_A, layer.lora_B) for part in weights.values()]
        if parts and not layer.lora_variant and all(isinstance(part, nn.Linear) for part in parts):
            layer.cast_input_dtype_enabled = False
            for part in parts:
                part.__class__ = InputTypeLinear


def train_attached(model: Any) -> None:
    """Make an attached adapter trainable in float32, without dropout, and add a frozen copy of it to every layer.

    Args:
        model: a model of diffusers, or a PeftModel, whose adapter is called TRAINED.
    """
    for layer in lora_layers(model):
        for module in layer.lora_dropout.values():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name in (*LAYER_STATE, *LAYER_WEIGHTS):
            entries = getattr(layer, name)
            if TRAINED in entries:
                entries[FROZEN] = copy.deepcopy(entries[TRAINED])
    model.peft_config[TRAINED].lora_dropout = 0.0
    model.peft_config[FROZEN] = copy.deepcopy(model.peft_config[TRAINED])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(f".{TRAINED}" in name)
    train_in_float32(model)


@contextlib.contextmanager
def reference_weights(model: Any) -> Iterator[None]:
    """Context manager in which a model has its start weights: the frozen copy's, or those without adapter.

    The layers are found once, and their flags are set directly. PEFT's own functions walk over all modules and change
    `requires_grad` in each step, which takes tens of milliseconds.

    Args:
        model: a model with a LoRA.
    """
    if model not in _layers_of:
        _layers_of[model] = lora_layers(model)
    layers = _layers_of[model]
    name, start, policy = ("_active_adapter", [FROZEN], [TRAINED]) if FROZEN in model.peft_config else OFF
    try:
        for layer in layers:
            object.__setattr__(layer, name, start)  # nn.Module looks for parameters first
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, name, policy)


def merge_layers(model: nn.Module) -> None:
    """Add an attached adapter to the weights of its layers, in float32, and cast the sum to the weights' type.

    Raises:
        ValueError: if the weights are quantised.
    """
    if is_quantized(model):
        raise ValueError(
            "the adapter would be merged into quantised weights, which cannot hold it exactly. Leave out quantize"
        )
    _layers_of.pop(model, None)
    for layer in lora_layers(model):
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_"):
                parameter.data = parameter.data.float()
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge(adapter_names=[TRAINED])
        weight.data = weight.data.to(dtype)


def merge_diffusers(model: Any) -> None:
    """Merge an attached adapter into a denoiser or a text encoder of a pipeline, and remove its layers."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    merge_layers(model)
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False


def merge_peft(model: Any) -> Any:
    """Merge an attached adapter into a PeftModel and return the transformers model without PEFT's layers.

    Raises:
        ValueError: if a layer's weights are those of the head too, which merging would change.
    """
    head = model.get_base_model().get_output_embeddings()
    for layer in lora_layers(model):
        base = layer.get_base_layer()
        if head is not None and base is not head and base.weight is head.weight:
            raise ValueError(
                "the adapter changes the input embeddings, and merging it would change the head, which shares their weights. "
                "Take adapter_result continued"
            )
    merge_layers(model)
    with warnings.catch_warnings():  # that its layers are merged already
        warnings.simplefilter("ignore")
        return model.merge_and_unload()
