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
KOHYA_FILE = "kohya_lora_weights.safetensors"
FORMATS = ("diffusers", "kohya")
KOHYA_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}


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


def check_format(config: TrainConfig, prefix: str | None, *, family: str) -> None:
    """Raises ValueError where a config's lora_format is unknown or can't be written. prefix: the family's `kohya_prefix`."""
    if config.lora_format not in FORMATS:
        raise ValueError(f"lora_format {config.lora_format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if config.lora_format == "kohya" and (prefix is None or config.tuning != "lora"):
        why = f"{family} has no names there" if prefix is None else f"tuning is {config.tuning}, which makes no LoRA"
        raise ValueError(f"lora_format 'kohya': {why}; take 'diffusers'")


def save_kohya(model: Any, prefix: str, folder: Path) -> None:
    """The model's LoRA once more, by the names that kohya's scripts, ComfyUI and A1111 read."""
    from safetensors.torch import save_file

    save_file(kohya_weights(model, prefix), folder / KOHYA_FILE)


def kohya_weights(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """prefix_module.lora_down.weight, .lora_up.weight and .alpha of each adapted module, its dots underscores."""
    from peft import get_peft_model_state_dict

    alpha = float(model.peft_config["default"].lora_alpha)
    found: dict[str, torch.Tensor] = {}
    for name, weight in get_peft_model_state_dict(model).items():
        module, part, _ = name.rsplit(".", 2)
        key = f"{prefix}_{module.replace('.', '_')}"
        found[f"{key}.{KOHYA_PARTS[part]}.weight"] = weight.contiguous()
        found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


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
