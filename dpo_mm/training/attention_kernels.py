"""Kernels of attention that training may use on a GPU.

torch chooses one for `scaled_dot_product_attention` by shapes and masks: flash, memory-efficient, cuDNN or math. cuDNN's backward
pass failed for FLUX.1 on an H100 (`mha_graph.execute`), so training leaves it out. The values of the others differ by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Context manager in which cuDNN's attention is off. After it, the setting is what it was before."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def describe_attention(device_type: str) -> dict[str, str]:
    """Return the plan's line on attention, by its name. There is none on a CPU, which has no choice.

    Args:
        device_type: cpu or cuda.
    """
    if device_type != "cuda":
        return {}
    return {"attention": "flash, memory-efficient or math kernels of torch. cuDNN's are off in training"}
