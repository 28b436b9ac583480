"""What trains of a policy, and how a test gives it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def restored_weights(policy: Any) -> Iterator[None]:
    """Context manager after which the weights that train are what they were before."""
    before = {p: p.data.clone() for p in policy.model.parameters() if p.requires_grad}
    try:
        yield
    finally:
        for parameter, data in before.items():
            parameter.data.copy_(data)
