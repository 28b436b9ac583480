"""Build modules without weights, on the meta device, where tensors have shapes but no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Context manager in which modules are built without weights, and without initialisation.

    On this device PyTorch initialises a layer in Python, which takes about 1 ms. A model of transformers needs `tie_weights()`
    afterwards.
    """
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        yield
