"""Logits in float32 from a head in half precision.

In bfloat16 a logit of 16 is rounded to a multiple of 1/8. The error of a margin grows with the length of the responses, and
reaches the size of the signal in the first steps. Here the inputs of the product stay in half precision, which makes their
products exact in float32, and the sum is not rounded. The gradients are in half precision, as without this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.policies.vlm.varlen import HALF


class _Float32Product(torch.autograd.Function):
    """states (tokens, width) times the transpose of weight (vocabulary, width), both in half precision, in float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        gradient = gradients[0].to(states.dtype)
        of_states, of_weight = ctx.needs_input_grad
        return gradient @ weight if of_states else None, gradient.t() @ states if of_weight else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in float32 of matrices in half precision."""
    if left.is_meta:  # the memory of CUDA's kernel is estimated, which copies neither matrix
        return (left @ right).float()
    if left.is_cuda and torch.version.cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def float32_logits(head: nn.Module, own_forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Compute the logits of a head in float32.

    Heads that are not a plain linear layer, such as quantised ones, compute them in their precision.

    Args:
        head: the output head.
        own_forward: its forward pass.
        states: hidden states, (tokens, width).
    """
    device = "cpu" if states.is_meta else states.device.type  # the meta device has no autocast
    weight: Any = getattr(head, "weight", None)
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    half = autocast if autocast in HALF else getattr(weight, "dtype", None)
    if type(head) is not nn.Linear or type(weight) not in (Tensor, nn.Parameter) or half not in HALF:
        return own_forward(states).float()
    with torch.autocast(device, enabled=False):
        product: Tensor = _Float32Product.apply(states.to(half), weight.to(half))
        return product if head.bias is None else product + head.bias.float()
