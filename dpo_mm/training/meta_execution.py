"""Run a model on the meta device as a GPU runs it: shapes and types of CUDA's autocast and attention, without values.

Weights and activations are meta tensors, which have no storage. Small integers and masks (token ids, image grids, lengths) are
real tensors on the CPU, because models read their values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
LARGEST_REAL = 2**22
"""Largest number of elements of a tensor that is created with values."""


class MixedMetaMode(TorchDispatchMode):
    """Dispatch mode in which meta tensors and real integers mix.

    An operation on real tensors alone runs. If one input is a meta tensor, so is the result. A tensor with values is never
    moved to the meta device if it contains integers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            if "device" in kwargs and _is_meta(kwargs["device"]) and _has_values(func, tensors, args, kwargs):
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor):
            args = (args[0], _positions(args[1]), *args[2:])
        elif func is aten.masked_select.default and not args[1].is_meta:
            func, args = aten.index.Tensor, (args[0], _positions([args[1]]))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        if not all(tensor.is_meta for tensor in tensors):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _has_values(func: Any, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> bool:
    """True if the result of an operation without meta inputs is to be real: integers, or a small new tensor."""
    if tensors:
        dtype = kwargs.get("dtype") or tensors[0].dtype
        return not dtype.is_floating_point
    dtype = kwargs.get("dtype")
    if dtype is None and func.overloadpacket in (aten.arange, aten.full, aten.scalar_tensor):
        return True
    return dtype is not None and not dtype.is_floating_point


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta and value.ndim:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _positions(indices: Any) -> list[Any]:
    """Replace real boolean masks of an index by the positions of their True values."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and not index.is_meta and index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


FLOAT32 = frozenset([
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "__pow__", "__rpow__", "softplus", "layer_norm", "rms_norm", "group_norm", "cosine_similarity",
    "nll_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cdist", "logsumexp", "interpolate",
    "cross_entropy", "binary_cross_entropy_with_logits",
])  # fmt: skip
"""Functions that CUDA's autocast runs in float32 (ATen/autocast_mode.h)."""
FLOAT32_RESULT = frozenset(["prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "norm"])
"""Functions whose result is float32."""
HALF = frozenset([
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm",
    "addmv", "matmul", "__matmul__", "__rmatmul__", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm",
    "scaled_dot_product_attention",
])  # fmt: skip
"""Functions that it runs in half precision."""
HALVES = (torch.bfloat16, torch.float16)


class CudaRules(TorchFunctionMode):
    """Function mode with the types of CUDA's autocast and the kernels of its attention, for tensors on the meta device.

    The state of autocast is that of the CPU, which does not touch meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] | None = None
        """Half-precision copies of trained weights, which autocast stores until it ends. None: they are not stored."""

    def __enter__(self) -> Self:
        """Enter the mode. Autocast of the meta device is that of the CPU in it."""
        self.autocast: Any = torch.autocast
        torch.autocast = lambda device_type, *args, **kwargs: self.autocast(  # type: ignore[assignment, misc]
            "cpu" if device_type == "meta" else device_type, *args, **kwargs
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.autocast = self.autocast  # type: ignore[misc]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in HALF:
                args, kwargs = tree_map(self._half, (args, kwargs))
            elif name in FLOAT32:
                args, kwargs = tree_map(_float32, (args, kwargs))
            elif name in FLOAT32_RESULT and kwargs.get("dtype") is None and args[0].dtype in HALVES:
                kwargs["dtype"] = torch.float32
        if name == "scaled_dot_product_attention" and (args[0] if args else kwargs["query"]).is_meta:
            return cuda_attention(*args, **kwargs)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def storing_casts(self) -> Iterator[None]:
        """Context manager in which half-precision copies of trained weights are stored, as in autocast's cache."""
        self.casts = {}
        try:
            yield
        finally:
            self.casts = None

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.is_meta:
            return value
        half = torch.get_autocast_dtype("cpu")
        if self.casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(half)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(half)
        return self.casts[id(value)]


def run_backward(loss: Tensor) -> None:
    """Backward pass in which the function modes stay active. `Tensor.backward` leaves them for checkpointed activations."""
    engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    start = (torch.ones_like(loss),)
    engine.run_backward((loss,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_meta and value.dtype in HALVES else value


def cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention as CUDA computes it: FlashAttention in half precision without a mask, else memory-efficient attention."""
    if enable_gqa and attn_mask is not None:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is None and query.dtype in HALVES and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        shape = (*query.shape[:-1], key.shape[-2])
        if attn_mask.dtype != query.dtype:  # a copy as numbers
            attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
        attn_mask = attn_mask.expand(shape)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]
