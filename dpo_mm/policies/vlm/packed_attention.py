"""Attention of a vision tower within packed sequences, such as windows or images, in a few calls.

Many towers of transformers pack the patches of all images into one row. With SDPA they read the boundaries on the host
and attend once per sequence and layer: Qwen2.5-VL makes thousands of small calls per image. If the name of the attention
contains "flash", a tower passes the boundaries instead. The attention of this file has such a name and takes the first of
these kernels that fits:

    varlen          torch.nn.attention.varlen, on CUDA in half precision
    FlashAttention  the package flash_attn, on CUDA in half precision
    by length       SDPA, once per length: sequences of equal length are a batch
    one by one      SDPA, once per sequence, as the tower does itself

Each kernel is compared with the last one on the first tensors of its kind, with gradients if they are needed. A kernel that
differs is not used, and a warning gives the reason.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_mm.policies.vlm.architecture import non_language_modules
from dpo_mm.policies.vlm.varlen import HALF, attend_varlen, has_varlen

logger = logging.getLogger(__name__)

NAME = "dpo_mm_flash_packed"
"""Name of the attention in a tower's configuration. The towers look for "flash" in it."""
FLASH_LENGTH = 128
"""Longest sequence for which torch.nn.attention.varlen uses FlashAttention on every card."""
LIMIT, HALF_LIMIT = 5e-3, 5e-2
"""Largest difference between two kernels that counts as rounding, relative to a token's output or to a gradient: in float32, with
room for TF32, and in half precision."""


@dataclass(frozen=True)
class Packed:
    """Sequences of a packed row, read from their boundaries once per batch.

    Attributes:
        boundaries: first token of each sequence and the number of tokens, int32, (sequences + 1,), on the tokens' device.
        lengths: tokens of each sequence.
        groups: sequences of equal length, as (sequences, length), in the order of `order`.
        order: tokens of the groups, one after the other, (tokens,). None if they are in this order already.
        inverse: the order that restores the row, (tokens,), or None.
    """

    boundaries: Tensor
    lengths: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    inverse: Tensor | None


def packed_sequences(boundaries: Tensor) -> Packed:
    """Group the sequences of a packed row by length. It waits for the device once.

    Args:
        boundaries: first token of each sequence and the number of tokens, (sequences + 1,).
    """
    return _packed(boundaries, packed_fields(boundaries))


def packed_fields(boundaries: Tensor) -> dict[str, Any]:
    """Fields of `Packed` without the boundaries, as a dict that is moved to the device with a batch."""
    edges = np.array(boundaries.tolist())
    lengths, starts = np.diff(edges), edges[:-1]
    sizes, counts = np.unique(lengths[lengths > 0], return_counts=True)
    groups = tuple(zip(counts.tolist(), sizes.tolist(), strict=True))
    order = inverse = None
    if (np.diff(lengths) < 0).any():
        by_length = lengths.argsort(kind="stable")
        tokens = np.concatenate([np.arange(starts[n], starts[n] + lengths[n]) for n in by_length])
        order, inverse = torch.from_numpy(np.stack([tokens, tokens.argsort()])).to(boundaries.device)
    return {"lengths": tuple(lengths.tolist()), "groups": groups, "order": order, "inverse": inverse}


def _packed(boundaries: Tensor, fields: dict[str, Any]) -> Packed:
    return Packed(boundaries.to(torch.int32), **fields)


_PACKED = WeakTensorKeyDictionary()
"""Sequences by the tensor of their boundaries, which all layers of a batch share."""


def remember_sequences(boundaries: Tensor, fields: dict[str, Any]) -> None:
    """Store what `packed_fields` found on the host, so that the attention does not read these boundaries."""
    _PACKED[boundaries] = _packed(boundaries, fields)


def _sequences(boundaries: Tensor) -> Packed:
    packed: Packed | None = _PACKED.get(boundaries)
    if packed is None:
        packed = _PACKED[boundaries] = packed_sequences(boundaries)
    return packed


# Kernels. Each takes query, key and value, (1, heads, tokens, width), and returns (1, tokens, heads, width).

Kernel = Callable[..., Tensor]


def _token_major(*tensors: Tensor) -> list[Tensor]:
    """(1, heads, tokens, width) to (tokens, heads, width)."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]


def _varlen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, **options: Any) -> Tensor:
    q, k, v = _token_major(query, key, value)
    boundaries, longest = (packed.boundaries,) * 2, (max(packed.lengths),) * 2
    return attend_varlen(q, k, v, boundaries, longest, scaling=options.get("scaling"))[None]


def _flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, **options: Any
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(packed.lengths)
    boundaries = (packed.boundaries, packed.boundaries, longest, longest)
    output: Tensor = flash_attn_varlen_func(
        *_token_major(query, key, value), *boundaries, softmax_scale=options.get("scaling")
    )
    return output[None]


def _by_length(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, **options: Any) -> Tensor:
    tensors = [query, key, value]
    if packed.order is not None:
        tensors = [tensor.index_select(2, packed.order) for tensor in tensors]
    outputs, start = [], 0
    for count, length in packed.groups:
        end = start + count * length
        q, k, v = (tensor[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for tensor in tensors)
        outputs.append(sdpa_attention_forward(module, q, k, v, None, **options)[0].flatten(0, 1))
        start = end
    output = (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]
    return output if packed.inverse is None else output.index_select(1, packed.inverse)


def _one_by_one(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, **options: Any) -> Tensor:
    splits = [tensor.split(packed.lengths, dim=2) for tensor in (query, key, value)]
    parts = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in zip(*splits, strict=True)]
    return torch.cat(parts, dim=1)


KERNELS: dict[str, Kernel] = {
    "varlen": _varlen,
    "FlashAttention": _flash_attention,
    "by length": _by_length,
    "one by one": _one_by_one,
}


def _candidates(query: Tensor, key: Tensor, longest: int, options: dict[str, Any]) -> list[str]:
    """Names of the kernels that may compute this attention, the fastest first."""
    plain = not options.get("dropout") and query.shape[1] == key.shape[1] and query.shape[-1] % 8 == 0
    names = []
    if plain and query.is_cuda and query.dtype in HALF:
        capability = torch.cuda.get_device_capability(query.device)
        # For longer sequences on newer cards, torch takes cuDNN's kernel, which training leaves out (`attention_kernels`).
        if capability >= (8, 0) and has_varlen() and (longest <= FLASH_LENGTH or capability < (9, 0)):
            names.append("varlen")
        if capability >= (8, 0) and importlib.util.find_spec("flash_attn") is not None:
            names.append("FlashAttention")
    return [*names, "by length", "one by one"]


# The check


Run = Callable[[str, Sequence[Tensor]], Tensor]
"""Function of a name in KERNELS and of query, key and value."""
_CHOSEN: dict[tuple[Any, ...], str] = {}
"""Name of the kernel that agreed, by the kind of tensors."""


def _kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, options: dict[str, Any]
) -> Kernel:
    """Return the first kernel that agrees with calls one by one on tensors of this kind."""
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    size = (max(packed.lengths) - 1).bit_length()  # kernels differ by length
    shape = (query.shape[1], key.shape[1], query.shape[-1], size, bool(options.get("dropout")))
    kind = (
        query.device,
        query.dtype,
        value.dtype,
        torch.is_autocast_enabled(query.device.type),
        needs_gradient,
        *shape,
    )
    if kind not in _CHOSEN:
        names = _candidates(query, key, max(packed.lengths), options)
        run: Run = lambda name, tensors: KERNELS[name](module, *tensors, packed, **{**options, "dropout": 0.0})
        for name, next_name in zip(names, [*names[1:], ""], strict=True):
            reason = _why_not(name, run, (query, key, value), needs_gradient)
            if reason is None:
                break
            logger.warning(
                "%s: the attention kernel %r %s. %r is used instead", type(module).__name__, name, reason, next_name
            )
        _CHOSEN[kind] = name
    return KERNELS[_CHOSEN[kind]]


def _why_not(name: str, run: Run, tensors: Sequence[Tensor], needs_gradient: bool) -> str | None:
    """Reason against a kernel, or None if it agrees with calls one by one.

    Args:
        name: a name in KERNELS.
        run: runs a kernel.
        tensors: query, key and value.
        needs_gradient: True if gradients are compared too.
    """
    if name == "one by one":
        return None
    try:
        difference = _difference(*(_results(each, run, tensors, needs_gradient) for each in (name, "one by one")))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of a kernel is a reason, because SDPA works
        return f"fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    limit = HALF_LIMIT if tensors[0].dtype in HALF else LIMIT
    return None if difference <= limit else f"differs from SDPA by {difference:.1e} (allowed {limit:g})"


def _results(name: str, run: Callable[..., Tensor], tensors: Sequence[Tensor], needs_gradient: bool) -> list[Tensor]:
    """The kernel's output, and the gradients of half its square."""
    # The hooks are those of no checkpoint, which would count the tensors of this check.
    with torch.set_grad_enabled(needs_gradient), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        leaves = [tensor.detach().requires_grad_(needs_gradient) for tensor in tensors]
        output = run(name, leaves)
        gradients = torch.autograd.grad(output, leaves, output.detach()) if needs_gradient else ()
        return [output.detach().flatten(2)[0].float(), *(gradient.flatten()[None].float() for gradient in gradients)]


def _difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of rows: tokens of the output, and gradients as a whole. Infinite if not finite."""
    largest = 0.0
    for result, right in zip(results, expected, strict=True):
        norms = right.norm(dim=1)
        relative = (result - right).norm(dim=1) / norms.clamp(min=float(norms.mean()) / 10 + 1e-20)
        largest = max(largest, float(relative.nan_to_num(nan=torch.inf).max()))
    return largest


# Installation


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """Attention function of transformers. Without boundaries it is SDPA."""
    boundaries = options.pop("cu_seq_lens_q", None)
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        options.pop(name, None)
    if boundaries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = _sequences(boundaries)
    return _kernel(module, query, key, value, packed, options)(module, query, key, value, packed, **options), None


def pack_vision_attention(base_model: Any) -> None:
    """Give the vision towers of a model this attention, if they pack sequences and use SDPA.

    Towers with another attention, such as eager or FlashAttention, do not change. Neither does the language model.

    Args:
        base_model: a transformers model without wrappers.
    """
    others = (base_model.config, base_model.config.get_text_config())
    for part in non_language_modules(base_model):
        for tower in part.modules():
            if isinstance(tower, PreTrainedModel) and not any(tower.config is other for other in others):
                pack_attention(tower)


def pack_attention(tower: PreTrainedModel) -> None:
    """Give a vision tower this attention, if it packs sequences and uses SDPA."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    packs = any("cu_seqlens" in inspect.signature(module.forward).parameters for module in tower.modules())
    if packs and tower.config._attn_implementation == "sdpa":
        tower.config._attn_implementation = NAME
