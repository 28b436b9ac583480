"""Record the family of every contract test in its result, which docs/draw_families.py reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

COVERED_FAMILIES = {
    "stable-diffusion-v", "stable-diffusion-tiny-vae", "sd3.5-without-t5", "flux-schnell",
    "idefics3", "internvl", "llava_next", "llava_onevision", "paligemma", "qwen2_vl", "smolvlm",
}  # fmt: skip
"""Families whose code another family also runs. The quick tests skip them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if (
            Path(__file__).parent in item.path.parents
            and parameters
            and parameters.params.get("family") in COVERED_FAMILIES
        ):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def record_family(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "family" in parameters.params:
        record_property("family", parameters.params["family"])
