"""Notes the family of every contract test in its result, which docs/draw_families.py reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

ALIKE = {
    "stable-diffusion-v", "stable-diffusion-tiny-vae", "sd3.5-without-t5", "flux-schnell",
    "idefics3", "internvl", "llava_next", "llava_onevision", "paligemma", "qwen2_vl", "smolvlm",
}  # fmt: skip
"""Families whose code in the package another family runs too: the quick tests leave them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if Path(__file__).parent in item.path.parents and parameters and parameters.params.get("family") in ALIKE:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def noted_family(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "family" in parameters.params:
        record_property("family", parameters.params["family"])
