"""Parse configs from YAML files and command-line flags. Errors name the file, the key and the fix."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dpo_mm.assets import presets_folder
from dpo_mm.config import TRAINER_NAMES, TrainConfig
from dpo_mm.errors import did_you_mean

T = TypeVar("T")


def trainer_names_of(kind: type[Any]) -> dict[str, str]:
    """Return the Trainer's names that a config accepts, with its own fields. Only TrainConfig has some."""
    return TRAINER_NAMES if kind is TrainConfig else {}


def known_names(kind: type[Any]) -> list[str]:
    """Return all names that set a field of a config: its fields and, for TrainConfig, the Trainer's names."""
    return [field.name for field in dataclasses.fields(kind)] + list(trainer_names_of(kind))


def with_field_names(kind: type[Any], values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Rename the Trainer's names in `values` to the config's fields.

    Args:
        kind: the config's dataclass.
        values: settings by name.
        source: file or flags that the values come from, for the error.

    Raises:
        ValueError: if a setting is given under both names.
    """
    trainer_names = trainer_names_of(kind)
    for name in values:
        if trainer_names.get(name) in values:
            raise ValueError(f"{source}: {name} and {trainer_names[name]} are the same setting. Give only one of them")
    return {trainer_names.get(name, name): value for name, value in values.items()}


def overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with overrides. Of steps and num_train_epochs, the one among the overrides counts."""
    replaced = {"steps": "num_train_epochs", "num_train_epochs": "steps"}
    dropped = {replaced.get(name) for name in overrides} - set(overrides)
    return {**{name: value for name, value in values.items() if name not in dropped}, **overrides}


def config_from_mapping(kind: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Build a config from plain values of a YAML file or of flags.

    Args:
        kind: the config's dataclass.
        values: settings by name. TrainConfig also accepts the names in TRAINER_NAMES.
        source: file or flags that the values come from, for errors.

    Raises:
        ValueError: if a setting is unknown, missing, given under two names, or has a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    values = with_field_names(kind, values, source=source)
    for key in values:
        if key not in hints:
            raise ValueError(f"{source}: {key!r} is not a setting; {did_you_mean(key, known_names(kind))}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    missing = [name for name in required if name not in values]
    if missing:
        it, flags = "it" if len(missing) == 1 else "them", ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise ValueError(f"{source}: {names} missing. Give {it} in the file or as {flags}")
    return kind(**{key: _coerce(value, hints[key], f"{source}: {key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, setting: str) -> Any:
    """Convert a value to the type of its field. It may be a text from the command line or a list from YAML."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and type(None) in options):
            return None
        kinds = [option for option in options if option is not type(None)]
        preferred = [k for k in kinds if isinstance(value, typing.get_origin(k) or k)]
        if float in kinds and isinstance(value, str | int) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        return _coerce(value, (preferred or kinds)[0], setting)
    if dataclasses.is_dataclass(hint):
        return _nested(value, hint, setting)  # type: ignore[arg-type]
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, Mapping) else list(value)
        return tuple(_coerce(part, options[0], setting) for part in parts)
    if origin is dict:
        return _names(value, setting) if options[1] is str else _mapping(value, setting)
    return _plain(value, hint, setting)


def _nested(value: Any, kind: type[T], setting: str) -> T:
    """Build a dataclass from a mapping, or from a text, which is its first field."""
    name = dataclasses.fields(kind)[0].name  # type: ignore[arg-type]
    values = {name: value} if isinstance(value, str) else value
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping) or (name not in values and not set(values) - set(known_names(kind))):
        raise ValueError(f"{setting}: expected a name, or settings such as {{{name}: FILE}}, got {value!r}")
    return config_from_mapping(kind, values, source=setting)


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Parse the flag --columns. Raises ValueError if a part is not theirs=ours."""
    return None if text is None else _names(text, "columns")


def _names(value: Any, setting: str) -> dict[str, str]:
    if isinstance(value, str) and all("=" in part for part in value.split(",")):
        value = dict(part.split("=", 1) for part in value.split(","))
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise ValueError(
            f"{setting}: expected names with their new names, such as 'caption=prompt,good=image_a', got {value!r}"
        )
    return {old.strip(): new.strip() for old, new in value.items()}


def _mapping(value: Any, setting: str) -> dict[str, float]:
    if isinstance(value, str) and all(":" in part for part in value.split(",")):
        value = dict(part.split(":", 1) for part in value.split(","))
    if not isinstance(value, Mapping):
        raise ValueError(f"{setting}: expected names with numbers, such as 'sigmoid:0.8,sft:0.2', got {value!r}")
    return {str(key): _plain(number, float, f"{setting}.{key}") for key, number in value.items()}


def _plain(value: Any, kind: type, setting: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
    elif kind is str and isinstance(value, str | Path):
        return str(value)
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    if isinstance(value, kind):
        return value
    raise ValueError(f"{setting}: expected {kind.__name__}, got {value!r}")


def settings_file(path: str | Path) -> Path:
    """Return the file of that name, or else the preset of that name, such as faithfulness-sdxl.

    Raises:
        ValueError: if there is neither.
    """
    preset = presets_folder() / f"{path}.yaml"
    if Path(path).exists():
        return Path(path)
    if Path(path).name == str(path) and preset.exists():
        return preset
    raise ValueError(f"{path}: no such file, and no preset of that name. `dpo-mm presets` lists the presets")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the settings in a YAML file, or in the preset of that name if there is no such file.

    Raises:
        ValueError: if the file is missing, is not valid YAML, or is not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(settings_file(path).read_bytes())  # YAML detects UTF-8 and UTF-16
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings as 'key: value' lines")
    return values
