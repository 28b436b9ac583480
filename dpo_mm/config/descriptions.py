"""Descriptions of settings, read from the source of their dataclass: type, default, group and the text below each field.

A comment alone on its line, such as `# Objective`, starts a group.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
from typing import Any, NamedTuple

REQUIRED = "required"


class Setting(NamedTuple):
    """One field of a settings dataclass."""

    name: str
    type: str
    """Annotation, for example `float | str`."""
    default: Any
    """dataclasses.MISSING if the setting is required."""
    description: str
    group: str
    """Empty if the dataclass has no groups."""


def describe_settings(kind: type[Any]) -> list[Setting]:
    """Return the settings of a config in the order of its fields."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    defaults = {field.name: _default(field) for field in dataclasses.fields(kind)}
    settings, group = [], ""
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = lines[node.lineno - 2].strip()
        group = above.removeprefix("# ") if above.startswith("# ") else group
        text = following.value.value if isinstance(following, ast.Expr) and _is_text(following.value) else ""  # type: ignore[attr-defined]
        name = node.target.id
        settings.append(Setting(name, ast.unparse(node.annotation), defaults[name], " ".join(text.split()), group))
    return settings


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def yaml_value(value: Any) -> str:
    """Write a value of a setting in YAML, on one line."""
    import yaml

    if value is dataclasses.MISSING:
        return REQUIRED
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        value = list(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).removesuffix("...\n").strip()
    )
