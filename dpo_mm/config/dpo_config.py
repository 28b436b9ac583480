"""Settings of `DPOTrainer`: those of a training run, also under the names that transformers and TRL give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_mm.config.train_config import TRAINER_NAMES, TrainConfig

TRL_NAMES = {"loss_type": "objective", "rpo_alpha": "sft_weight", "warmup_ratio": "warmup_steps"}
"""Names of TRL and of older Trainers, and the fields that they set."""
OF_FILES = ("model", "pairs", "columns", "media_dir", "revision", "quantize", "min_pixels", "max_pixels")
"""Settings that `DPOTrainer` takes from the objects it is given."""
STRATEGIES = {"eval_strategy": "eval_every", "save_strategy": "save_every"}
"""Names of the Trainer that are "no" or "steps", and the fields with the steps."""
TRL_STEPS = 500
"""Steps between two evaluations or checkpoints of the Trainer, if only the strategy is given."""


@dataclass(frozen=True, init=False)
class DPOConfig(TrainConfig):
    """Settings of a `DPOTrainer`: the fields of TrainConfig without model and pairs, under either of their names.

    The names are those of TrainConfig, `TRAINER_NAMES` or `TRL_NAMES`, or these: `bf16`, `fp16`, `loss_weights`,
    `label_smoothing`, `eval_strategy`, `save_strategy`. `eval_fraction` is 0, because the trainer takes an `eval_dataset`.

    Args:
        output_dir: folder for the result, the log and the checkpoints.
        **settings: settings by name.

    Raises:
        ValueError: if a setting is unknown, given under two names, of the wrong type or out of its range, or belongs to the
            model or the rows.
    """

    def __init__(self, output_dir: str | Path, **settings: object) -> None:
        from dpo_mm.config.config_parsing import config_from_mapping

        given = [name for name in OF_FILES if settings.get(name)]
        if given:
            where = "the processor" if given[0].endswith("_pixels") else "the model or the dataset"
            raise ValueError(f"DPOConfig: {given[0]} is a setting of {where}, which DPOTrainer gets as an object")
        values = {"eval_fraction": 0.0, **_fields_of(settings), "output_dir": str(output_dir), "model": "", "pairs": ""}
        config = config_from_mapping(TrainConfig, values, source="DPOConfig")
        for field in dataclasses.fields(config):
            object.__setattr__(self, field.name, getattr(config, field.name))

    def named(self, model: str, pairs: str) -> TrainConfig:
        """Return the settings of the run, with names of its model and its rows."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return TrainConfig(**{**settings, "model": model, "pairs": pairs})


def _fields_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate names and values of TRL that are not one field of TrainConfig each."""
    values = dict(settings)
    half = {name: values.pop(name) for name in ("bf16", "fp16") if name in values}
    if half:
        _refuse_both(values, next(iter(half)), "precision")
        values["precision"] = next((name for name, wanted in half.items() if wanted), "fp32")
    if "label_smoothing" in values:
        smoothing = values.pop("label_smoothing")
        values["objective_kwargs"] = {**values.get("objective_kwargs", {}), "label_smoothing": smoothing}
    if values.get("report_to") == "none":
        values["report_to"] = ()
    if values.get("remove_unused_columns") is False:  # as always
        del values["remove_unused_columns"]
    _combine_losses(values)
    for name in [name for name in TRL_NAMES if name in values]:
        _refuse_both(values, name, TRL_NAMES[name])
        values[TRL_NAMES[name]] = values.pop(name)
    _replace_strategies(values)
    return values


def _refuse_both(values: Mapping[str, Any], name: str, field: str) -> None:
    if field in values:
        raise ValueError(f"DPOConfig: {name} and {field} are the same setting. Give only one of them")


def _combine_losses(values: dict[str, Any]) -> None:
    """Make TRL's list of losses, with their weights if it has several, an objective."""
    losses, weights = values.get("loss_type"), values.pop("loss_weights", None)
    if isinstance(losses, list | tuple):
        if weights is not None and len(weights) != len(losses):
            raise ValueError(f"DPOConfig: loss_weights has {len(weights)} numbers for {len(losses)} losses")
        values["loss_type"] = dict(zip(losses, weights or [1.0] * len(losses), strict=True))
        if len(losses) == 1 and not weights:
            values["loss_type"] = losses[0]
    elif weights is not None:
        raise ValueError("DPOConfig: loss_weights needs a list of losses as loss_type")


def _replace_strategies(values: dict[str, Any]) -> None:
    """Make the Trainer's strategies the steps between two evaluations or checkpoints."""
    trainer_names = {field: name for name, field in TRAINER_NAMES.items()}
    for name, field in STRATEGIES.items():
        strategy = values.pop(name, None)
        if strategy is None:
            continue
        if strategy == "no":
            values.pop(trainer_names[field], None)
            values[field] = 0
        elif strategy != "steps":
            raise ValueError(f"DPOConfig: {name} is {strategy!r}. Expected 'no' or 'steps'")
        elif field not in values and trainer_names[field] not in values:
            values[field] = TRL_STEPS
