"""A denoiser's LoRA and its files: added, saved, read, attached for drawing, all in the stock library's formats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_mm.config import TrainConfig

LORA_FILE = "pytorch_lora_weights.safetensors"


def has_lora(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None))


def add_lora(model: Any, config: TrainConfig, targets: Sequence[str]) -> None:
    """A fresh LoRA on modules of these names, float32, that changes nothing yet. Raises ValueError where none matches."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(config.lora_targets or targets),
        )
        try:
            model.add_adapter(adapter)
        except ValueError as error:
            raise ValueError(f"lora_targets: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_lora(pipe: Any, denoiser: str, folder: Path) -> None:
    """The LoRA of a pipeline's denoiser in diffusers' own format, with its rank and alpha."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    model = getattr(pipe, denoiser)
    type(pipe).save_lora_weights(
        folder,
        **{f"{denoiser}_lora_layers": get_peft_model_state_dict(model)},
        **_collate_lora_metadata({denoiser: model}),
    )


def read_lora(model: nn.Module, denoiser: str, file: Path) -> None:
    """Read a saved LoRA into the one that the model has. Raises ValueError where it does not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = {key.removeprefix(f"{denoiser}."): value for key, value in load_file(file).items()}
    result: Any = set_peft_model_state_dict(model, weights, adapter_name="default")  # type: ignore[arg-type]
    if result.unexpected_keys:
        raise ValueError(f"{file}: {result.unexpected_keys[0]} does not fit this model's LoRA")


@contextlib.contextmanager
def lora_scaled(model: Any, scale: float) -> Iterator[None]:
    """Within it the model's LoRA acts with this strength; 0 is the base."""
    names = list(model.peft_config)
    model.set_adapters(names, [scale] * len(names)) if scale else model.disable_adapters()
    try:
        yield
    finally:
        if not scale:
            model.enable_adapters()


def refuse_pickle(folder: Path) -> None:
    """Raises ValueError for an adapter in PEFT's format whose weights would have to be unpickled."""
    if not (folder / "adapter_model.safetensors").exists():
        raise ValueError(f"adapter {str(folder)!r} has no adapter_model.safetensors; pickled weights are not read")
