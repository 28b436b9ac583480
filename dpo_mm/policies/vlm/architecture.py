"""What is what in a transformers model: its classes, the parts beside the language model, what drops out, what a LoRA adapts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn


def classes_of(config: Any, source: str) -> tuple[Any, Any]:
    """The auto classes that open a model and its processor. Raises ValueError for a kind that isn't handled."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder or hasattr(config, "decoder"):
        raise ValueError(f"model {source!r} is a {kind}, an encoder-decoder; only decoder-only models are handled")
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText, AutoProcessor
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM, AutoTokenizer
    raise ValueError(f"model {source!r} is a {kind}; expected an image-text-to-text or causal language model")


def outside_language(core: Any) -> list[nn.Module]:
    """Vision tower, projector and whatever else is neither the language model nor its head."""
    decoder, head = core.get_decoder(), core.get_output_embeddings()
    inner = core.base_model
    return [] if decoder is inner else [m for m in inner.children() if m is not decoder and m is not head]


def without_dropout(core: nn.Module) -> None:
    """Let nothing drop out, in training either, as in the DPO authors' code: policy and reference see the same model."""
    for module in core.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def lora_targets(core: Any, names: Sequence[str] | None, *, train_vision_tower: bool) -> str:
    """A regular expression of the linear layers that a LoRA adapts: all but the head, or those of these names.

    Raises ValueError where none matches.
    """
    head, decoder = core.get_output_embeddings(), core.get_decoder()
    places = [name for name, module in core.named_modules() if module is decoder]
    prefix = "" if train_vision_tower or not places or not places[0] else f"{places[0]}."
    linear = [n for n, m in core.named_modules() if isinstance(m, nn.Linear) and m is not head and n.startswith(prefix)]
    leaves = {name.rpartition(".")[2] for name in linear}
    if names is not None:
        unknown = [name for name in names if name not in leaves]
        if unknown:
            raise ValueError(
                f"lora_targets: {unknown[0]!r} is no linear layer of {prefix or 'it'}; known: {', '.join(sorted(leaves))}"
            )
        linear = [name for name in linear if name.rpartition(".")[2] in names]
    return "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\.\\d+", re.escape(name)) for name in linear}))
