"""Attention of torch for sequences of different length that stand one after the other, without padding."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""Types for which the kernel exists."""


def has_varlen() -> bool:
    """Return True if torch has attention of variable length."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's arguments, which differ by release."""
    return frozenset(inspect.signature(function).parameters)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    scaling: float | None,
    causal: bool = False,
) -> Tensor:
    """Attention within each sequence, (tokens, heads, width).

    Args:
        query: (tokens, heads, width).
        key, value: (tokens, heads or fewer heads that groups of the query's share, width).
        boundaries: first token of each sequence and the number of tokens, of queries and of keys, int32, (sequences + 1,) each.
        longest: tokens of the longest sequence, of queries and of keys.
        scaling: factor of the scores. None: width to the power of -1/2.
        causal: True if the last query sees all keys, the one before it all but the last, and so on.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = _arguments(varlen_attn)
    options: dict[str, Any] = {}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    if scaling is not None and scaling != query.shape[-1] ** -0.5:  # the first releases have no argument for it
        options["scale"] = scaling
    output: Any = varlen_attn(query, key, value, *boundaries, *longest, **options)
    return output
