"""Settings in `--help` and `--print-config`, from the dataclasses of the settings."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from typer.core import TyperCommand

from dpo_mm.config import (
    CompareConfig,
    CompareResponsesConfig,
    MineConfig,
    MineResponsesConfig,
    RelabelConfig,
    TrainConfig,
)
from dpo_mm.config.descriptions import Setting, describe_settings, yaml_value

WORDS = {
    "str": "TEXT",
    "int": "INT",
    "float": "FLOAT",
    "bool": "true|false",
    "None": "none",
    "SidePrompts": "FILE",
    "SideQuestions": "FILE",
}
WIDTH = 100
"""Columns of the comments in a printed config."""
CONFIGS: dict[str, tuple[type[Any], ...]] = {
    "train": (TrainConfig,),
    "verify": (TrainConfig,),
    "mine": (MineConfig, MineResponsesConfig),
    "compare": (CompareConfig, CompareResponsesConfig),
    "relabel": (RelabelConfig,),
}
"""Configs of each command whose settings are flags: one, or that of images and that of responses."""


class SettingsCommand(TyperCommand):
    """A command whose help and completion list the settings that it accepts as flags."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        for title, settings in grouped(CONFIGS[self.name or ""]):
            with formatter.section(title):
                formatter.write_dl([(_flag(setting), _text(setting)) for setting in settings])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete a flag: options of the command, and settings."""
        own = super().shell_complete(ctx, "--")
        if not own:  # after --help
            return own
        item = type(own[0])  # the class is in another module in each version of typer
        settings = {setting.name: setting for kind in CONFIGS[self.name or ""] for setting in describe_settings(kind)}
        texts = {f"--{name.replace('_', '-')}": setting.description for name, setting in settings.items()}
        flags = [*own, *(item(flag, help=text) for flag, text in texts.items())]
        return [flag for flag in flags if flag.value.startswith(incomplete)]


def grouped(kinds: tuple[type[Any], ...]) -> Iterable[tuple[str, list[Setting]]]:
    """Yield the settings of one or two configs by group, with a title. Two configs: shared settings first, then their own."""
    if len(kinds) == 1:
        for group, settings in itertools.groupby(describe_settings(kinds[0]), key=lambda setting: setting.group):
            yield group or "Settings", list(settings)
        return
    images, responses = map(describe_settings, kinds)
    shared = {setting[:4] for setting in images} & {setting[:4] for setting in responses}
    yield "Settings", [setting for setting in images if setting[:4] in shared]
    yield "Settings for images", [setting for setting in images if setting[:4] not in shared]
    yield "Settings for responses", [setting for setting in responses if setting[:4] not in shared]


def _flag(setting: Setting) -> str:
    return f"--{setting.name.replace('_', '-')} {_word(setting.type)}"


def _word(annotation: str) -> str:
    """Write an annotation as the value of a flag."""
    if annotation.startswith("tuple["):
        return ",".join(_word(kind.strip()) for kind in annotation[6:].partition("]")[0].split(","))
    if annotation.startswith("dict["):
        return "THEIRS=OURS,..." if annotation.startswith("dict[str, str]") else "NAME:NUMBER,..."
    parts = [part.strip() for part in annotation.split(" | ")]
    if len(parts) > 1:
        return "|".join(_word(part) for part in parts if part != "None")
    return WORDS.get(annotation, annotation)


def _text(setting: Setting) -> str:
    """Description and default of a flag. A file writes null where a flag has none."""
    if setting.default is dataclasses.MISSING:
        return f"{setting.description} [required]"
    default = "none" if setting.default is None else yaml_value(setting.default)
    return f"{setting.description.replace('null:', 'none:')} [default: {default}]"


def commented_config(values: Mapping[str, Any]) -> str:
    """Write a training config as commented YAML.

    Args:
        values: settings by name. The others are written as comments, with their defaults.
    """
    lines = []
    for title, settings in grouped((TrainConfig,)):
        lines += ["", f"# {title}"]
        for setting in settings:
            lines += textwrap.wrap(setting.description, WIDTH, initial_indent="# ", subsequent_indent="# ")
            given = setting.name in values
            missing = setting.default is dataclasses.MISSING and not given
            value = "..." if missing else yaml_value(values.get(setting.name, setting.default))
            lines.append(f"{'' if given or missing else '# '}{setting.name}: {value}")
    return "\n".join(lines).strip() + "\n"
