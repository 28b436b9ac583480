"""Record the family of every contract test in its result, which docs/draw_families.py reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contracts.families import BUILDERS

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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return the folder of an image family's tiny pipeline. No test changes its files."""
    return functools.cache(lambda family: str(BUILDERS[family].build(tmp_path_factory.mktemp(family))))
