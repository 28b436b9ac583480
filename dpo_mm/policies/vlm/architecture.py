"""Parts of a transformers model: auto classes, modules outside the language model, dropout, LoRA targets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn


def auto_classes_for(config: Any, source: str) -> tuple[Any, Any]:
    """Choose the auto classes that load a model and its processor.

    Args:
        config: the model's transformers config.
        source: folder or hub id of the model, for the error.

    Raises:
        ValueError: if the model has custom code, is an encoder-decoder, or neither an image-text-to-text nor a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if getattr(config, "auto_map", None):  # of a hub model. That of a folder is refused before
        raise ValueError(f"model {source!r} has custom code (auto_map), and code of models is not run")
    model_type = config.model_type
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder or hasattr(config, "decoder"):
        raise ValueError(
            f"model {source!r} is a {model_type}, an encoder-decoder. Only decoder-only models are supported"
        )
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText, AutoProcessor
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM, AutoTokenizer
    raise ValueError(f"model {source!r} is a {model_type}. Expected an image-text-to-text or causal language model")


def non_language_modules(base_model: Any) -> list[nn.Module]:
    """List the vision tower, the projector and all other modules except the language model and its head."""
    decoder, head = base_model.get_decoder(), base_model.get_output_embeddings()
    inner = base_model.base_model
    return [] if decoder is inner else [m for m in inner.children() if m is not decoder and m is not head]


def unquantized_modules(base_model: Any) -> dict[str, nn.Module]:
    """Modules that `quantize` does not touch, by name: vision tower, projector and head."""
    head = base_model.get_output_embeddings()
    apart = [*non_language_modules(base_model), *([] if head is None else [head])]
    return {name: module for name, module in base_model.named_modules() if any(module is part for part in apart)}


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, also in training, as in the DPO authors' code.

    Policy and reference then compute the same function.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def lora_targets(base_model: Any, names: Sequence[str] | None, *, train_vision_tower: bool) -> str:
    """Build a regular expression of the linear layers that a LoRA adapts.

    Args:
        base_model: a transformers model without wrappers.
        names: names of linear layers, such as q_proj. None is all linear layers except the head.
        train_vision_tower: True also adapts layers outside the language model.

    Raises:
        ValueError: if a name is not a linear layer.
    """
    head, decoder = base_model.get_output_embeddings(), base_model.get_decoder()
    decoder_names = [name for name, module in base_model.named_modules() if module is decoder]
    whole_model = train_vision_tower or not decoder_names or not decoder_names[0]
    prefix = "" if whole_model else f"{decoder_names[0]}."
    linear = [
        name
        for name, module in base_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.startswith(prefix)
    ]
    leaves = {name.rpartition(".")[2] for name in linear}
    if names is not None:
        unknown = [name for name in names if name not in leaves]
        if unknown:
            raise ValueError(
                f"lora_targets: {unknown[0]!r} is not a linear layer of {prefix or 'the model'}. "
                f"Known: {', '.join(sorted(leaves))}"
            )
        linear = [name for name in linear if name.rpartition(".")[2] in names]
    return "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\.\\d+", re.escape(name)) for name in linear}))
