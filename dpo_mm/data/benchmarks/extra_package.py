"""Import packages of the extra `measures`."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, package: str, *, extra: str = "measures") -> Any:
    """Import a module of a package that only published measures need.

    Raises:
        ValueError: if the package is not installed. It names the install line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(
            f"this published measure needs {package}, which is not installed. Run pip install 'dpo-mm[{extra}]'"
        ) from None
