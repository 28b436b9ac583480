"""Quantise frozen linear layers while a model loads, through the `quantization_config` of diffusers and transformers.

nf4 is by bitsandbytes (Dettmers et al. 2023, 2305.14314), which has gradients on a GPU only. int8 and fp8 are by torchao: it stores
the weights in 8 bits and computes in the precision of the run, so a row's log-prob does not depend on the rest of its batch, as it
does with 8-bit activations. A LoRA trains on top of them. Embeddings, the head, norms and convolutions stay in the precision of the
run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.errors import did_you_mean
from dpo_mm.models.meta_device import meta_device

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""Package that quantises, by setting."""
FP8_CAPABILITY = (8, 9)
"""Smallest compute capability with 8-bit floats: Ada, Hopper and newer."""
LARGE_ENCODER = 10**9
"""Weights from which a pipeline's text encoder is quantised: T5-XXL, Gemma 2, Qwen. CLIP is smaller."""


def check_quantize(name: str | None, *, device: torch.device | str | None = None) -> None:
    """Refuse a quantisation that this machine cannot run.

    Args:
        name: nf4, int8 or fp8, or None.
        device: where the model will be. None is the GPU if there is one.

    Raises:
        ValueError: if the name is unknown, its package is not installed, or the device does not have it.
    """
    if name is None:
        return
    if name not in PACKAGES:
        raise ValueError(f"quantize {name!r} is unknown; {did_you_mean(name, PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise ValueError(f"quantize {name!r} needs {PACKAGES[name]}; pip install 'dpo-mm[quantized]'")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "nf4" and device.type != "cuda":
        raise ValueError(
            "quantize 'nf4' needs an NVIDIA GPU, because 4-bit weights have no gradient on a CPU. Use int8"
        )
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(
            f"quantize 'fp8': this GPU ({torch.cuda.get_device_name(device)}) does not have 8-bit floats. Use int8, which "
            "takes the same memory"
        )


def quantization_config(name: str, *, library: str, dtype: torch.dtype, skip: list[str] | None) -> Any:
    """Build the configuration that `from_pretrained` of a library takes.

    Args:
        name: nf4, int8 or fp8.
        library: diffusers or transformers.
        dtype: precision in which the layers compute.
        skip: names of modules that are not quantised. None: the head of a language model.
    """
    import diffusers
    import transformers

    module: Any = diffusers if library == "diffusers" else transformers
    if name == "nf4":
        return module.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    with quiet():
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        kind = Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig()
        return module.TorchAoConfig(kind, modules_to_not_convert=skip)


def empty_model(cls: Any, source: str, options: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """Build a transformers model without weights, on the meta device.

    Args:
        cls: the model's class, or an auto class.
        source: folder or hub id.
        options: arguments of `from_pretrained`, of which subfolder and revision are used.

    Returns:
        Its configuration and the model.
    """
    from transformers import AutoConfig

    where = {key: options[key] for key in ("subfolder", "revision") if key in options}
    is_auto = hasattr(cls, "_model_mapping")
    config = (AutoConfig if is_auto else cls.config_class).from_pretrained(source, trust_remote_code=False, **where)
    with meta_device():
        model = cls.from_config(config, trust_remote_code=False) if is_auto else cls(config)
    model.tie_weights()
    return config, model


def is_large(cls: Any, source: str, options: Mapping[str, Any]) -> bool:
    """Return True if a transformers model has at least LARGE_ENCODER weights. The arguments are those of `empty_model`."""
    _, model = empty_model(cls, source, options)
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE_ENCODER


def refuse_quantized(config: Any, name: str) -> None:
    """Raise ValueError if a model's files are quantised already.

    Args:
        config: the model's configuration, of either library.
        name: the model, for the error.
    """
    before = (
        config.get("quantization_config")
        if isinstance(config, Mapping)
        else getattr(config, "quantization_config", None)
    )
    if before:
        method = before.get("quant_method") if isinstance(before, Mapping) else getattr(before, "quant_method", None)
        raise ValueError(
            f"{name}: its files are quantised already ({getattr(method, 'value', method)}). Leave out quantize, or use the "
            "original model"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager without the messages of torchao and diffusers about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "diffusers.quantizers.torchao")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a quantised tensor stores, or the tensor itself if it is a plain one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in plain_tensors(getattr(tensor, name))]


def is_quantized(module: nn.Module) -> bool:
    """Return True if a parameter of a module is quantised."""
    return any(hasattr(part, "__tensor_flatten__") or hasattr(part, "quant_state") for part in module.parameters())


def refuse_whole_model(module: nn.Module, folder: object) -> None:
    """Raise ValueError if a module is quantised, because the whole tuned model in this folder would not be."""
    if is_quantized(module):
        raise ValueError(f"adapter {str(folder)!r} is a whole model. quantize is for a base with a LoRA: leave it out")


def stored_size(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers take, quantised or not."""
    tensors = [inner for part in (*module.parameters(), *module.buffers()) for inner in plain_tensors(part)]
    states = [getattr(part, "quant_state", None) for part in module.parameters()]
    tensors += [inner for state in states if state is not None for inner in state.as_dict(packed=True).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
