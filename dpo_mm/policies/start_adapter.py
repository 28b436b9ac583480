"""The adapter from which a training starts: attached and trained further, or merged into the weights below a new one."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_mm.config import TrainConfig
from dpo_mm.policies.adapter_checks import ADAPTER_FILE, ADAPTER_WEIGHTS
from dpo_mm.policies.adapter_sources import START_FOLDER, find_adapter, lora_file, weights_file, weights_sha256
from dpo_mm.policies.adapters import SavedLora, has_lora, merge_pipeline, saved_lora
from dpo_mm.policies.lora_layers import TRAINED, lora_layers, merge_peft
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy

RESULTS = ("continued", "stacked")
"""Values of adapter_result."""
NOT_CONTINUED = ("modules_to_save", "trainable_token_indices", "layer_replication")
"""Settings of PEFT's adapters that change more than the LoRA's layers, so a frozen copy of the layers is not the start."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of a LoRA that change the weights below it when it is loaded."""


def continues(config: TrainConfig) -> bool:
    """Return True if a run trains the adapter that it starts from."""
    return config.adapter is not None and config.tuning == "lora" and config.adapter_result == "continued"


def is_stacked(config: TrainConfig) -> bool:
    """Return True if a run trains a new LoRA on top of the adapter that it starts from."""
    return config.adapter is not None and config.tuning == "lora" and config.adapter_result == "stacked"


def check_start(config: TrainConfig) -> None:
    """Check the settings of a start before a model is loaded.

    Raises:
        ValueError: if the adapter does not exist, is a whole model, or does not go with the other settings.
    """
    if config.adapter_result not in RESULTS:
        raise ValueError(f"adapter_result {config.adapter_result!r} is unknown. Expected one of {', '.join(RESULTS)}")
    if config.adapter is None:
        return
    path = find_adapter(config.adapter)
    if (path / START_FOLDER).is_dir():
        raise ValueError(
            f"adapter {config.adapter!r} is stacked on another adapter ({START_FOLDER}), and a third cannot start from both. "
            "Merge them into a model, and give it as model"
        )
    if not (path / ADAPTER_FILE).exists() and lora_file(path) is None:
        whole = any((path / name).exists() for name in ("model_index.json", "config.json", "unet", "transformer"))
        reason = "is a whole model. Give it as model" if whole else f"has no {ADAPTER_FILE} and no safetensors file"
        raise ValueError(f"adapter {config.adapter!r} {reason}")
    if config.quantize and not continues(config):
        raise ValueError(
            f"adapter: it would be merged into the weights, which {config.quantize} cannot hold exactly. Take adapter_result "
            "continued, or leave out quantize"
        )


def start_from(policy: ImagePolicy | TextPolicy, config: TrainConfig) -> None:
    """Make an attached adapter the start of a run: check that it can be trained, or merge it.

    Args:
        policy: loaded with the config's adapter, not yet prepared.
        config: settings of the run.

    Raises:
        ValueError: if the adapter cannot be trained, or a setting does not fit it. It names both.
    """
    models = _adapted_models(policy)
    name = f"adapter {config.adapter!r}"
    if not models:
        raise ValueError(f"{name} is a whole model. Give it as model")
    for model in models.values():
        kind = getattr(model.peft_config[TRAINED].peft_type, "value", "")
        if kind != "LORA":
            raise ValueError(f"{name} is a {kind}. Only LoRA and DoRA can be trained further or merged")
    if not continues(config):
        if policy.modality == "text":
            policy.model = merge_peft(policy.model)  # type: ignore[misc]
        else:
            merge_pipeline(policy.pipe)
        return
    if not has_lora(policy.model):
        raise ValueError(
            f"{name} adapts only {', '.join(models)}, so nothing is left to train. Take adapter_result stacked"
        )
    _check_trainable(policy, config, name)
    if policy.modality == "image":
        policy.encoder_loras = _encoder_loras(policy, models, name)
    elif config.train_vision_tower and not _adapts_vision(policy):
        raise ValueError(f"train_vision_tower: {name} has no layer in the vision tower. Take adapter_result stacked")


def _adapted_models(policy: ImagePolicy | TextPolicy) -> dict[str, Any]:
    """Models with an attached adapter, by their names in the pipeline."""
    if policy.modality == "text":
        return {"model": policy.model} if has_lora(policy.model) else {}
    return {name: part for name, part in policy.pipe.components.items() if has_lora(part)}


def _adapts_vision(policy: TextPolicy) -> bool:
    """True if an attached adapter has a layer outside the language model."""
    from dpo_mm.policies.vlm.architecture import non_language_modules

    return any(lora_layers(module) for module in non_language_modules(policy.model.get_base_model()))  # type: ignore[operator]


def _lora_config(policy: ImagePolicy | TextPolicy) -> Any:
    """PEFT's config of the adapter that trains."""
    model: Any = policy.model
    return model.peft_config[TRAINED]


def _check_trainable(policy: ImagePolicy | TextPolicy, config: TrainConfig, name: str) -> None:
    """Raise ValueError if the layers of an adapter are not all of it, or another rank, alpha or targets are set."""
    own, fix = _lora_config(policy), "Take adapter_result stacked"
    features = [feature for feature in NOT_CONTINUED if getattr(own, feature, None)]
    features += [f"bias {own.bias}"] if own.bias != "none" else []
    if str(own.init_lora_weights).startswith(CHANGES_BASE):
        features.append(f"init_lora_weights {own.init_lora_weights}")
    layers = lora_layers(policy.model)
    variants = {type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()}
    features += sorted(variant for variant in variants if "Dora" not in variant)
    if features:
        raise ValueError(f"{name} has {features[0]}, which cannot be trained next to a frozen copy. {fix}")
    own_settings = {
        "lora_rank": own.r,
        "lora_alpha": own.lora_alpha,
        "use_rslora": own.use_rslora,
        "use_dora": own.use_dora,
    }
    for setting, value in own_settings.items():
        given = getattr(config, setting)
        if given not in (value, getattr(TrainConfig, setting)):
            raise ValueError(f"{setting} is {given}, but {name} has {value}. Leave {setting} out. Or: {fix}")
    targets = own.target_modules
    if config.lora_targets is not None and (isinstance(targets, str) or set(config.lora_targets) != set(targets)):
        raise ValueError(f"lora_targets are not those of {name}. Leave lora_targets out. Or: {fix}")
    if config.lora_format == "kohya" and (own.use_dora or own.lora_bias):
        raise ValueError(f"lora_format 'kohya': {name} has {'DoRA' if own.use_dora else 'biases'}. Use 'diffusers'")


def _encoder_loras(policy: ImagePolicy, models: Mapping[str, Any], name: str) -> dict[str, SavedLora]:
    """LoRAs of the text encoders by name, unchanged, for the file of the result."""
    encoders = {part: model for part, model in models.items() if model is not policy.model}
    save = getattr(type(policy.pipe), "save_lora_weights", None)
    known = inspect.signature(save).parameters if save else {}
    for part in encoders:
        if f"{part}_lora_layers" not in known:
            raise ValueError(
                f"{name} adapts {part}, and a LoRA file of {type(policy.pipe).__name__} cannot contain that. Take adapter_result "
                "stacked"
            )
    return {part: saved_lora(model) for part, model in encoders.items()}


def start_file(config: TrainConfig) -> Path | None:
    """Return the file of weights of the adapter below a stacked one. None if the result is not stacked."""
    return weights_file(find_adapter(str(config.adapter))) if is_stacked(config) else None


def save_start(config: TrainConfig, folder: Path) -> None:
    """Copy the adapter below a stacked one into the folder of the result, so that both are in one place."""
    if (file := start_file(config)) is None:
        return
    target = folder / START_FOLDER
    target.mkdir(exist_ok=True)
    shutil.copyfile(file, target / file.name)
    if file.name == ADAPTER_WEIGHTS:
        shutil.copyfile(file.parent / ADAPTER_FILE, target / ADAPTER_FILE)


def describe_start(policy: ImagePolicy | TextPolicy, config: TrainConfig) -> dict[str, str]:
    """Return the line of a run's summary that names its start, empty without one."""
    if config.adapter is None:
        return {}
    how = "merged into the model"
    if continues(config):
        own = _lora_config(policy)
        how = f"trained further, rank {own.r}, alpha {own.lora_alpha:g}"
    elif config.tuning == "lora":
        how += ", with a new LoRA on top"
    return {"adapter": f"{config.adapter}, sha256 {weights_sha256(config.adapter)}, {how}"}
