"""Judges in the folder in which a command runs. Only names from the command line or the user's config are searched there."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_mm.judges import parse_judge_name

FIELDS_WITH_JUDGES = ("judge", "judges", "guards", "sample_judges", "side_sets", "mine", "train", "compare")
"""Fields of a config or a recipe that name judges, or that contain configs which do."""


def import_from_working_folder(names: Any) -> None:
    """Make judges `module:function` importable from the working folder if their module is a file or a package there.

    The folder comes last in the search path, so that no file in it replaces an installed module. Call it with names that the
    user gave, never with those of a result folder.

    Args:
        names: a name, several with commas, a sequence of names, or a config with such settings.
    """
    for name in _judge_names(names):
        module = name.partition(":")[0].partition(".")[0]
        if ":" not in name or parse_judge_name(name) is not None or not module.isidentifier():
            continue
        folder = Path.cwd()
        is_there = (folder / f"{module}.py").is_file() or (folder / module / "__init__.py").is_file()
        if is_there and importlib.util.find_spec(module) is None:
            sys.path.append(str(folder))


def _judge_names(value: Any) -> Iterator[str]:
    """Names of judges in a setting's value, or in the settings of a config that name judges."""
    if isinstance(value, str):
        yield from (name.strip() for name in value.split(","))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _judge_names(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name in FIELDS_WITH_JUDGES:
                yield from _judge_names(getattr(value, field.name))
