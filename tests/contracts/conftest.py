"""Record the family of every contract test in its result, which docs/draw_families.py reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

QUICK_FAMILIES = {"stable-diffusion", "sdxl", "sd3", "flux-dev", "llava", "qwen2_5_vl", "gemma3", "llama"}
"""Families of the quick tests: UNets, transformers, and models whose vision tokens, masks and positions differ."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if (
            Path(__file__).parent in item.path.parents
            and parameters
            and parameters.params.get("family", "llama") not in QUICK_FAMILIES
        ):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def record_family(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "family" in parameters.params:
        record_property("family", parameters.params["family"])
