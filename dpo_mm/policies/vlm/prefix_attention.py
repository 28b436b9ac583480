"""Attention calls of a packed sequence [prompt][chosen][rejected]. If a kernel without a mask exists, it is used.

    mask of the model    three calls, for prompt, chosen and rejected. For windows, soft caps, sinks and prefixes
    causal, no padding   two calls: [prompt, chosen] is a causal square, and rejected sees all of [prompt] and is causal
    causal, varlen       the same two for rows of different length, in one call each for all rows

The last square of rejected is aligned at the bottom right. On CUDA, FlashAttention computes it without a mask. "varlen" is
`torch.nn.attention.varlen`, on CUDA in half precision.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import repeat_kv

from dpo_mm.policies.vlm.prefix_layout import Layout
from dpo_mm.policies.vlm.varlen import HALF, attend_varlen, has_varlen

logger = logging.getLogger(__name__)

Attend = Callable[..., tuple[Tensor, Any]]
"""Attention function of transformers: (module, query, key, value, mask, **options) to (rows, columns, heads, width)."""
BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}
"""Backends of torch's attention that a kernel may use. cuDNN's is left out: its backward pass has failed on an H100."""


def kernels(base_model: Any, *, has_padding: bool) -> list[str]:
    """Names of the kernels that may compute the attention of a packed sequence on the model's device, the fastest first.

    Args:
        base_model: a transformers model without wrappers.
        has_padding: True if rows differ in length.
    """
    device = base_model.device
    if device.type != "cuda":
        return ["default"]
    packs = has_padding and base_model.dtype in HALF and torch.cuda.get_device_capability(device) >= (8, 0)
    if packs and not has_varlen():
        logger.warning(
            "Rows of different length use masks in attention. A newer torch, with torch.nn.attention.varlen, is faster"
        )
    return [*(["varlen"] if packs and has_varlen() else []), *BACKENDS]


def backends(kernel: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context manager in which torch's attention uses the backends of a kernel. "default" leaves the choice to torch."""
    if device.type != "cuda" or kernel == "default":
        return contextlib.nullcontext()
    return sdpa_kernel(BACKENDS.get(kernel, BACKENDS["flash"]))  # "varlen" computes what has no mask


def attend_with_mask(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    layout: Layout,
    **rest: Any,
) -> Tensor:
    """Attention with the model's mask (rows, 1, columns, columns), in three calls without the columns that none sees."""
    p, s = layout.prompt, layout.rejected_start
    keys, values = _without_chosen(key, layout), _without_chosen(value, layout)
    tail = torch.cat([mask[..., s:, :p], mask[..., s:, s:]], dim=-1)
    parts = (
        (query[:, :, :p], key[:, :, :p], value[:, :, :p], mask[..., :p, :p]),
        (query[:, :, p:s], key[:, :, :s], value[:, :, :s], mask[..., p:s, :s]),
        (query[:, :, s:], keys, values, tail),
    )
    return torch.cat([attend(module, *part, **rest)[0] for part in parts], dim=1)


def attend_causally(
    attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, **rest: Any
) -> Tensor:
    """Causal attention of rows without padding: [prompt, chosen] as a square, then rejected after the prompt."""
    s = layout.rejected_start
    first = attend(module, query[:, :, :s], key[:, :, :s], value[:, :, :s], None, **rest)[0]
    tensors = query[:, :, s:], _without_chosen(key, layout), _without_chosen(value, layout)
    if query.is_cuda and not rest.get("dropout"):
        tail = _attend_lower_right(module, *tensors, scaling=rest.get("scaling"))
    else:
        ends = layout.prompt + layout.rejected
        mask = torch.ones(layout.rejected, ends, dtype=torch.bool, device=query.device).tril_(layout.prompt)
        tail = attend(module, *tensors, mask[None, None], **rest)[0]
    return torch.cat([first, tail], dim=1)


def _attend_lower_right(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
) -> Tensor:
    """Causal attention aligned at the bottom right, without a mask in memory if torch has a kernel for it."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True)):
        key, value, groups = repeat_kv(key, groups), repeat_kv(value, groups), 1
    bias: Any = causal_lower_right(query.shape[2], key.shape[2])
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=groups > 1)
    return output.transpose(1, 2)


def attend_packed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, **rest: Any) -> Tensor:
    """Causal attention of rows of different length, in one call for [prompt, chosen] and one for rejected."""
    if rest.get("dropout"):
        raise RuntimeError("attention of variable length has no dropout")
    packing = layout.packing
    assert packing is not None
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    outputs = []
    for queries, keys in ((packing.first, packing.first), (packing.tail, packing.tail_keys)):
        some = q.index_select(0, queries.places), k.index_select(0, keys.places), v.index_select(0, keys.places)
        boundaries, longest = (queries.ends, keys.ends), (queries.longest, keys.longest)
        outputs.append(attend_varlen(*some, boundaries, longest, scaling=rest.get("scaling"), causal=True))
    places = torch.cat([packing.first.places, packing.tail.places])
    output = outputs[0].new_zeros(q.shape[0], *outputs[0].shape[1:]).index_copy(0, places, torch.cat(outputs))
    return output.unflatten(0, (query.shape[0], query.shape[2]))


def _without_chosen(tensor: Tensor, layout: Layout) -> Tensor:
    return torch.cat([tensor[:, :, : layout.prompt], tensor[:, :, layout.rejected_start :]], dim=2)
