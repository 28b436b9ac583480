"""LoRA adapters of denoisers: add, save and load them, in the formats of diffusers and kohya."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean
from dpo_mm.models.meta_device import meta_device
from dpo_mm.models.model_checks import HEADER_BYTES, check_safetensors, name_model
from dpo_mm.policies.adapter_checks import check_diffusers_lora, check_peft_adapter
from dpo_mm.policies.lora_layers import FROZEN, TRAINED, merge_diffusers, train_attached, train_in_float32

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora_weights.safetensors"
FORMATS = ("diffusers", "kohya")
LORA_LOGGERS = ("diffusers.utils.peft_utils", "diffusers.loaders.peft", "diffusers.loaders.lora_base")
"""Loggers on which diffusers warns about weights of a LoRA that it does not use."""
UNUSED_WEIGHTS = re.compile(r"unexpected keys|missing keys", re.IGNORECASE)
PEFT_PREFIX = "base_model.model."
"""Prefix of the weights' names in PEFT's files."""
KOHYA_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}


Weights = dict[str, torch.Tensor] | None
"""A model's state, gathered if its shards are on several processes. None if the model itself is complete."""


def has_lora(model: Any) -> bool:
    """Return True if the model has a LoRA."""
    return bool(getattr(model, "peft_config", None))


def lora_models(pipe: Any) -> list[Any]:
    """Return the pipeline's models that have a LoRA: the denoiser, and text encoders whose LoRA was loaded."""
    return [part for part in pipe.components.values() if has_lora(part)]


def merge_pipeline(pipe: Any) -> None:
    """Merge an attached LoRA into all models of a pipeline that it adapts, in float32."""
    for model in lora_models(pipe):
        merge_diffusers(model)


def add_lora(model: Any, config: TrainConfig, targets: Sequence[str]) -> None:
    """Add a new LoRA in float32, which does not change the model's output yet. An attached adapter trains instead.

    Args:
        model: a diffusers model.
        config: settings of the run. `lora_targets` replaces the default targets.
        targets: names of the modules to adapt by default.

    Raises:
        ValueError: if no module has a target's name.
    """
    from peft import LoraConfig

    if has_lora(model):
        return train_attached(model)
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
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights="gaussian",
            target_modules=list(config.lora_targets or targets),
        )
        try:
            inject_lora(model, adapter)
        except ValueError as error:
            raise ValueError(f"lora_targets: {error}") from error
    train_in_float32(model)


def inject_lora(model: Any, adapter: Any) -> None:
    """Add the layers of a LoRA to a model of diffusers or transformers.

    Args:
        model: a denoiser or a text encoder.
        adapter: PEFT's config.

    Raises:
        ValueError: if no module has a target's name.
    """
    from peft import inject_adapter_in_model

    if hasattr(model, "load_adapter"):  # of transformers, whose add_adapter refuses releases of PEFT that suffice here
        inject_adapter_in_model(adapter, model, TRAINED)
        model._hf_peft_config_loaded = True
    else:
        model.add_adapter(adapter)


class SavedLora(NamedTuple):
    """Weights of a LoRA by PEFT's names, its PEFT config, and the alpha of each adapted module by name, to divide by the rank."""

    weights: dict[str, torch.Tensor]
    config: Any
    alphas: dict[str, float]

    def renamed(self, rename: Callable[[str], str]) -> SavedLora:
        """Return the LoRA with other names of its modules."""
        weights = {}
        for name, weight in self.weights.items():
            module, part, kind = name.rsplit(".", 2)
            weights[f"{rename(module)}.{part}.{kind}"] = weight
        return SavedLora(weights, self.config, {rename(name): alpha for name, alpha in self.alphas.items()})


def saved_lora(model: Any, weights: Weights = None) -> SavedLora:
    """Return what a file contains of a model's LoRA.

    Args:
        model: a model with a LoRA.
        weights: the model's gathered state, if its shards are on several processes.
    """
    from peft import get_peft_model_state_dict

    sort_sets(model.peft_config[TRAINED])
    state = get_peft_model_state_dict(model, state_dict=weights, adapter_name=TRAINED)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_alpha")}
    scales = {name: layer.r[TRAINED] ** 0.5 if layer.use_rslora[TRAINED] else 1.0 for name, layer in layers.items()}
    alphas = {name: float(layer.lora_alpha[TRAINED]) * scales[name] for name, layer in layers.items()}
    return SavedLora(state, model.peft_config[TRAINED], alphas)


def save_lora(
    pipe: Any, denoiser: str, folder: Path, weights: Weights = None, encoders: Mapping[str, SavedLora] | None = None
) -> None:
    """Save the LoRA of a pipeline's denoiser in diffusers' format, with its rank and alpha.

    Args:
        pipe: the pipeline.
        denoiser: name of the denoiser in the pipeline.
        folder: an existing folder.
        weights: the denoiser's gathered state, if its shards are on several processes.
        encoders: LoRAs of text encoders by name, which are saved in the same file.
    """
    loras = {denoiser: saved_lora(getattr(pipe, denoiser), weights), **(encoders or {})}
    type(pipe).save_lora_weights(
        folder,
        **{f"{name}_lora_layers": lora.weights for name, lora in loras.items()},
        **{f"{name}_lora_adapter_metadata": lora.config.to_dict() for name, lora in loras.items()},
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
        with meta_device():
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
    if config.lora_format == "kohya" and config.use_dora:
        raise ValueError("lora_format 'kohya' does not go with use_dora. Use 'diffusers'")


def save_kohya(loras: Mapping[str, SavedLora], folder: Path) -> None:
    """Save LoRAs under the names that kohya's scripts, ComfyUI and A1111 read.

    Args:
        loras: the denoiser's LoRA and those of text encoders, by the prefix of their names.
        folder: an existing folder.
    """
    from safetensors.torch import save_file

    renamed = [kohya_weights(lora, prefix) for prefix, lora in loras.items()]
    save_file({name: tensor for part in renamed for name, tensor in part.items()}, folder / KOHYA_FILE)


def kohya_weights(lora: SavedLora, prefix: str) -> dict[str, torch.Tensor]:
    """Return the LoRA's weights by kohya's names.

    The names are prefix_module.lora_down.weight, prefix_module.lora_up.weight and prefix_module.alpha, with
    underscores instead of the dots in the module's name.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, weight in lora.weights.items():
        module, part, _ = name.rsplit(".", 2)
        key = f"{prefix}_{module.replace('.', '_')}"
        renamed[f"{key}.{KOHYA_PARTS[part]}.weight"] = weight.contiguous()
        renamed[f"{key}.alpha"] = torch.tensor(lora.alphas[module])
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
    from transformers.initialization import no_init_weights

    check_diffusers_lora(file, pipeline_modules(pipe))
    with name_model(f"adapter {str(file.parent)!r}"), _refuse_unused_weights(file), no_init_weights():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=TRAINED)
    for model in lora_models(pipe):
        layers = {name for name, layer in model.named_modules() if hasattr(layer, "lora_alpha")}
        targets = model.peft_config[TRAINED].target_modules
        unused = [] if isinstance(targets, str) else [t for t in targets if not any(n.endswith(t) for n in layers)]
        if unused:
            raise ValueError(f"{file}: {min(unused)} has no place in {type(model).__name__}. Is it of another model?")


def attach_peft(model: Any, folder: Path) -> None:
    """Attach an adapter in PEFT's format to a denoiser of diffusers.

    Raises:
        ValueError: as `attach_lora`.
    """
    from peft import PeftConfig
    from transformers.initialization import no_init_weights

    check_peft_adapter(folder, model)
    with name_model(f"adapter {str(folder)!r}"), no_init_weights():
        model.add_adapter(PeftConfig.from_pretrained(str(folder)), adapter_name=TRAINED)
    read_peft(model, folder)


def read_peft(model: Any, folder: Path) -> None:
    """Load saved weights in PEFT's format into a denoiser's LoRA. Raises ValueError if one does not fit it."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = {k.removeprefix(PEFT_PREFIX): v for k, v in load_peft_weights(str(folder), device="cpu").items()}
    with name_model(f"adapter {str(folder)!r}"):
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=TRAINED)
    missing = [name for name in result.missing_keys if "lora_" in name and f".{FROZEN}" not in name]
    if wrong := [*result.unexpected_keys, *missing]:
        raise ValueError(f"{folder}: {wrong[0]} does not fit this model's LoRA")


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
    stored, prefix = load_file(file), f"{denoiser}."
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    result: Any = set_peft_model_state_dict(model, weights, adapter_name=TRAINED)  # type: ignore[arg-type]
    if result.unexpected_keys:
        raise ValueError(f"{file}: {result.unexpected_keys[0]} does not fit this model's LoRA")


@contextlib.contextmanager
def at_lora_scale(models: Sequence[Any], scale: float) -> Iterator[None]:
    """Context manager that sets the weight of the LoRAs of a pipeline's models. 0 is the base model."""
    from diffusers.utils.peft_utils import set_adapter_layers, set_weights_and_activate_adapters

    for model in models:
        if scale:
            set_weights_and_activate_adapters(model, [TRAINED], [scale])
        else:
            set_adapter_layers(model, enabled=False)
    try:
        yield
    finally:
        for model in models:
            set_adapter_layers(model, enabled=True)
