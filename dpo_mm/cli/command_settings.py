"""Settings of a command from a YAML file, a preset or a section of a recipe, and from flags."""

from __future__ import annotations

from typing import Any

import typer

SETTINGS_AS_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes its settings as flags."""


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """Parse `--key value`, `--key=value` and a bare `--key` (true) as a mapping. Dashes become underscores.

    Raises:
        ValueError: if an argument is not a flag.
    """
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r} is not a flag. Expected --key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        values[key.replace("-", "_")] = value
    return values


def command_settings(kind: type[Any], path: str | None, section: str, flags: list[str]) -> dict[str, Any]:
    """Settings of a command: its section of a recipe, or all of a flat file. Flags override them."""
    from dpo_mm.config.config_parsing import overridden, read_yaml, with_field_names
    from dpo_mm.recipe import step_settings

    values = step_settings(read_yaml(path), section, source=path) if path else {}
    in_file = with_field_names(kind, values, source=path or "")
    return overridden(in_file, with_field_names(kind, parse_overrides(flags), source="flags"))


def file_and_flags(context: typer.Context, config: str | None) -> tuple[str | None, list[str]]:
    """Separate the file of settings from the flags.

    Flags are not options of the command, so click takes the first flag as the argument CONFIG if there is no file.
    """
    if config and config.startswith("--"):
        return None, [config, *context.args]
    return config, list(context.args)


def _origin(file: str | None, flags: list[str]) -> str:
    """Name what settings come from, for errors."""
    return " and ".join([*([file] if file else []), *(["flags"] if flags or not file else [])])


def train_settings(context: typer.Context, config: str | None) -> dict[str, Any]:
    """Settings of a training run that its file and flags name."""
    from dpo_mm.config import TrainConfig

    file, flags = file_and_flags(context, config)
    return command_settings(TrainConfig, file, "train", flags)


def train_config(context: typer.Context, config: str | None, **defaults: Any) -> Any:
    """Settings of a training run. `defaults` apply if neither file nor flags set them."""
    from dpo_mm.config import TrainConfig
    from dpo_mm.config.config_parsing import config_from_mapping
    from dpo_mm.judges.working_folder import import_from_working_folder

    file, flags = file_and_flags(context, config)
    settings = config_from_mapping(TrainConfig, defaults | train_settings(context, config), source=_origin(file, flags))
    import_from_working_folder(settings)
    return settings


def image_or_vlm_config(
    context: typer.Context, config: str | None, section: str, image_config: type[Any], vlm_config: type[Any]
) -> Any:
    """Settings of a command for image generators and vision-language models. The model decides which."""
    from dpo_mm.assets import resolve_asset
    from dpo_mm.config.config_parsing import config_from_mapping
    from dpo_mm.judges.working_folder import import_from_working_folder
    from dpo_mm.policies.families import VLM_POLICY, policy_path_for

    config, flags = file_and_flags(context, config)
    values = command_settings(image_config, config, section, flags)
    is_vlm = not {"questions", "server"}.isdisjoint(values) or (
        "model" in values
        and "prompts" not in values
        and policy_path_for(resolve_asset(values["model"]), revision=values.get("revision")) == VLM_POLICY
    )
    if is_vlm and "server" in values:
        values = {"model": values.get("served", ""), **values}
    settings = config_from_mapping(vlm_config if is_vlm else image_config, values, source=_origin(config, flags))
    import_from_working_folder(settings)
    return settings
