"""Settings of the commands and recipes: frozen dataclasses. The text below a field is its documentation."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dpo_mm.config.image_configs import CompareConfig, MineConfig
from dpo_mm.config.judge_configs import JudgeConfig, RelabelConfig
from dpo_mm.config.response_configs import CompareResponsesConfig, MineResponsesConfig
from dpo_mm.config.side_set_configs import SidePrompts, SideQuestions
from dpo_mm.config.train_config import TRAINER_NAMES, TrainConfig

__all__ = [
    "TRAINER_NAMES",
    "CompareConfig",
    "CompareResponsesConfig",
    "JudgeConfig",
    "MineConfig",
    "MineResponsesConfig",
    "RelabelConfig",
    "SidePrompts",
    "SideQuestions",
    "TrainConfig",
    "as_dict",
    "default_settings",
]


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values for JSON and YAML."""
    return dataclasses.asdict(config)


def default_settings(*kinds: type[Any]) -> dict[str, Any]:
    """Return the defaults of configs by name, as JSON has them.

    A record that an earlier version wrote lacks settings that came later. They had these values.
    """
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
        if not (field.default is field.default_factory is dataclasses.MISSING)
    }
    plain: dict[str, Any] = json.loads(json.dumps(defaults))
    return plain
