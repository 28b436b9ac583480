"""What `mkdocs build --strict` refuses, without building the site."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def documented() -> Iterator[Callable[..., Any]]:
    """The functions and classes on the page API, and the methods of the classes."""
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        member = getattr(importlib.import_module(module), attribute)
        yield member
        if inspect.isclass(member):
            yield from (method for method in vars(member).values() if inspect.isfunction(method))


def described_arguments(docstring: str) -> list[str]:
    """What stands before the colons in the section Args of a docstring."""
    section = re.search(r"^Args:\n((?: +.*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    return re.findall(r"^ {4}(\S.*?):", section[1], re.MULTILINE) if section else []


def test_args_sections_describe_each_argument_by_itself() -> None:
    described = [
        (f"{member.__qualname__}: {name}", name.lstrip("*") in inspect.signature(member).parameters)
        for member in documented()
        for name in described_arguments(inspect.getdoc(member) or "")
    ]
    assert len(described) > 100
    assert [name for name, is_argument in described if not is_argument] == []


def test_changelog_has_no_links_into_the_docs() -> None:
    """The site includes the changelog, where such links do not lead anywhere."""
    assert re.findall(r"\]\((docs/[^)]*)", (ROOT / "CHANGELOG.md").read_text()) == []
