"""LoRA adapters of denoisers: add, save and load them, in the formats of diffusers and kohya."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean
from dpo_mm.model_checks import HEADER_BYTES, check_safetensors, name_model
from dpo_mm.policies.adapter_checks import check_diffusers_lora

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora_weights.safetensors"
FORMATS = ("diffusers", "kohya")
LORA_LOGGERS = ("diffusers.utils.peft_utils", "diffusers.loaders.peft", "diffusers.loaders.lora_base")
"""Loggers on which diffusers warns about weights of a LoRA that it does not use."""
UNUSED_WEIGHTS = re.compile(r"unexpected keys|missing keys", re.IGNORECASE)
KOHYA_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}


Weights = dict[str, torch.Tensor] | None
"""A model's state, gathered if its shards are on several processes. None if the model itself is complete."""


def has_lora(model: Any) -> bool:
    """Return True if the model has a LoRA."""
    return bool(getattr(model, "peft_config", None))


def lora_models(pipe: Any) -> list[Any]:
    """Return the pipeline's models that have a LoRA: the denoiser, and text encoders whose LoRA was loaded."""
    return [part for part in pipe.components.values() if has_lora(part)]


def add_lora(model: Any, config: TrainConfig, targets: Sequence[str]) -> None:
    """Add a new LoRA in float32, which does not change the model's output yet.

    Args:
        model: a diffusers model.
        config: settings of the run. `lora_targets` replaces the default targets.
        targets: names of the modules to adapt by default.

    Raises:
        ValueError: if no module has a target's name.
    """
    from peft import LoraConfig

    names = [name for name, _ in model.named_modules()]
    for target in config.lora_targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted(
                {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
            )
            raise ValueError(f"lora_targets: no module is called {target!r}; {did_you_mean(target, known)}")
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


def save_lora(pipe: Any, denoiser: str, folder: Path, weights: Weights = None) -> None:
    """Save the LoRA of a pipeline's denoiser in diffusers' format, with its rank and alpha."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    model = getattr(pipe, denoiser)
    sort_sets(model.peft_config["default"])
    type(pipe).save_lora_weights(
        folder,
        **{f"{denoiser}_lora_layers": get_peft_model_state_dict(model, state_dict=weights)},
        **_collate_lora_metadata({denoiser: model}),
    )
    sort_metadata(Path(folder) / LORA_FILE)


def sort_sets(config: Any) -> None:
    """Replace the sets of a PEFT config by sorted lists, so that equal runs write equal files."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which safetensors writes in a random order, so that equal runs write equal files."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(HEADER_BYTES), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:
            stream.seek(HEADER_BYTES)
            stream.write(text)


def save_whole(model: Any, folder: Path, weights: Weights = None) -> None:
    """Save a whole model in diffusers' format."""
    if weights is not None:
        with torch.device("meta"):
            gathered = type(model).from_config(model.config)
        gathered.load_state_dict(weights, assign=True)
        model = gathered
    model.save_pretrained(folder)


def check_lora_format(config: TrainConfig, prefix: str | None, *, family: str) -> None:
    """Check that the LoRA can be saved in the format of a config.

    Args:
        config: settings of the run.
        prefix: `kohya_prefix` of the model's family. None if no kohya format is known.
        family: name of the family, for the error.

    Raises:
        ValueError: if `lora_format` is unknown, or the family or the tuning does not support it.
    """
    if config.lora_format not in FORMATS:
        raise ValueError(f"lora_format {config.lora_format!r} is unknown. Expected one of {', '.join(FORMATS)}")
    if config.lora_format == "kohya" and (prefix is None or config.tuning != "lora"):
        if prefix is None:
            reason = f"{family} has no names in kohya's format"
        else:
            reason = f"tuning is {config.tuning}, which makes no LoRA"
        raise ValueError(f"lora_format 'kohya': {reason}. Use 'diffusers'")


def save_kohya(model: Any, prefix: str, folder: Path, weights: Weights = None) -> None:
    """Save the model's LoRA under the names that kohya's scripts, ComfyUI and A1111 read."""
    from safetensors.torch import save_file

    save_file(kohya_weights(model, prefix, weights), folder / KOHYA_FILE)


def kohya_weights(model: Any, prefix: str, weights: Weights = None) -> dict[str, torch.Tensor]:
    """Return the LoRA's weights by kohya's names.

    The names are prefix_module.lora_down.weight, prefix_module.lora_up.weight and prefix_module.alpha, with
    underscores instead of the dots in the module's name.
    """
    from peft import get_peft_model_state_dict

    alpha = float(model.peft_config["default"].lora_alpha)
    renamed: dict[str, torch.Tensor] = {}
    for name, weight in get_peft_model_state_dict(model, state_dict=weights).items():
        module, part, _ = name.rsplit(".", 2)
        key = f"{prefix}_{module.replace('.', '_')}"
        renamed[f"{key}.{KOHYA_PARTS[part]}.weight"] = weight.contiguous()
        renamed[f"{key}.alpha"] = torch.tensor(alpha)
    return renamed


def pipeline_modules(pipe: Any) -> dict[str, nn.Module]:
    """Return the modules of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def attach_lora(pipe: Any, file: Path) -> None:
    """Attach a LoRA to a pipeline's denoiser and, if it has weights for them, its text encoders.

    Args:
        pipe: a diffusers pipeline.
        file: a file of weights that diffusers reads.

    Raises:
        ValueError: if the file is damaged, or a weight of it does not fit the pipeline.
    """
    check_diffusers_lora(file, pipeline_modules(pipe))
    with name_model(f"adapter {str(file.parent)!r}"), _refuse_unused_weights(file):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="tuned")


@contextlib.contextmanager
def _refuse_unused_weights(file: Path) -> Iterator[None]:
    """Context manager that turns diffusers' warnings about weights without a place into ValueError."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in LORA_LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
    unused = next((message for message in messages if UNUSED_WEIGHTS.search(message)), None)
    if unused:
        raise ValueError(f"{file}: {' '.join(unused.split())[:200]} Is it of another model?")


def read_lora(model: nn.Module, denoiser: str, file: Path) -> None:
    """Load a saved LoRA into the model's LoRA.

    Args:
        model: a denoiser with a LoRA.
        denoiser: the denoiser's name in the pipeline, which is the prefix of the saved names.
        file: a file that `save_lora` wrote.

    Raises:
        ValueError: if a saved weight does not fit the LoRA.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_safetensors(file)
    weights = {key.removeprefix(f"{denoiser}."): value for key, value in load_file(file).items()}
    result: Any = set_peft_model_state_dict(model, weights, adapter_name="default")  # type: ignore[arg-type]
    if result.unexpected_keys:
        raise ValueError(f"{file}: {result.unexpected_keys[0]} does not fit this model's LoRA")


@contextlib.contextmanager
def at_lora_scale(models: Sequence[Any], scale: float) -> Iterator[None]:
    """Context manager that sets the weight of the LoRAs of a pipeline's models. 0 is the base model."""
    from diffusers.utils.peft_utils import set_adapter_layers, set_weights_and_activate_adapters

    for model in models:
        names = list(model.peft_config)
        if scale:
            set_weights_and_activate_adapters(model, names, [scale] * len(names))
        else:
            set_adapter_layers(model, enabled=False)
    try:
        yield
    finally:
        for model in models:
            set_adapter_layers(model, enabled=True)
