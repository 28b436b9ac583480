"""Notes the family of every contract test in its result, which docs/draw_families.py reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def noted_family(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "family" in parameters.params:
        record_property("family", parameters.params["family"])
