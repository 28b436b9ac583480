"""JSON schema of recipe files, with which editors complete and check them."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from dpo_mm.config.descriptions import describe_settings
from dpo_mm.config.image_configs import CompareConfig, MineConfig
from dpo_mm.config.response_configs import CompareResponsesConfig, MineResponsesConfig
from dpo_mm.config.setting_limits import LIMITS
from dpo_mm.config.train_config import TRAINER_NAMES, TrainConfig

SCHEMA = "https://json-schema.org/draft/2020-12/schema"
PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[+-]?\d+(\.\d+)?([eE][+-]?\d+)?$"}]},
    type(None): {"type": "null"},
}
"""Schema of each plain type. YAML reads 1e-4, without a point, as a text."""
SECTIONS: dict[str, tuple[type[Any], ...]] = {
    "mine": (MineConfig, MineResponsesConfig),
    "train": (TrainConfig,),
    "compare": (CompareConfig, CompareResponsesConfig),
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with the description, the default and the range of each setting."""
    sections = {name: _section(*kinds) for name, kinds in SECTIONS.items()}
    top = {
        "title": {"type": "string", "description": "Heading of the report."},
        "output_dir": {"type": "string", "description": "Folder of the run, with a folder for each step."},
        "rounds": {
            "type": "integer",
            "minimum": 1,
            "description": "Largest number of rounds of mining, training and comparing.",
        },
        "baseline": {"enum": ["sft", None], "description": "sft: also train on the chosen side only."},
    }
    return {"$schema": SCHEMA, "title": "dpo-mm recipe", "type": "object", "properties": top | sections}


def _section(*kinds: type[Any]) -> dict[str, Any]:
    """Schema of a section, whose settings are those of any of the configs."""
    properties: dict[str, Any] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for setting in describe_settings(kind):
            values = _type(hints[setting.name], setting.name)
            entry = {**values, "description": setting.description}
            if isinstance(setting.default, str | int | float | bool | None):
                entry["default"] = setting.default
            first = properties.setdefault(setting.name, entry)
            if "anyOf" in values:  # the two kinds of comparisons have other side sets
                first["anyOf"] = [*first["anyOf"], *(each for each in values["anyOf"] if each not in first["anyOf"])]
    if TrainConfig in kinds:
        properties |= {name: properties[field] for name, field in TRAINER_NAMES.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _type(hint: Any, name: str = "") -> dict[str, Any]:
    """Schema of the values that a config accepts for a type, as `config_from_mapping` converts them."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_type(option, name) for option in options]}
    if origin is tuple:
        return {"anyOf": [{"type": "array", "items": _type(options[0])}, {"type": "string"}]}
    if origin is dict:
        return {"anyOf": [{"type": "object", "additionalProperties": _type(options[1])}, {"type": "string"}]}
    if dataclasses.is_dataclass(hint):
        return {"anyOf": [_section(hint), {"type": "string"}]}  # type: ignore[arg-type]
    limits = LIMITS.get(name) if hint in (int, float) else None
    if hint is not int or limits is None:
        return dict(PLAIN[hint])
    high = {} if limits.high == float("inf") else {"maximum": int(limits.high)}
    return {"type": "integer", "minimum": int(limits.low), **high}
