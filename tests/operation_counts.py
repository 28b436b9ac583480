"""Count operations and host synchronisations of a step, without a GPU.

    with OperationCounts() as counts:
        step()
    assert counts.num_synchronisations <= 2, counts.report()

On a GPU, the host queues kernels and runs ahead of it. It has to wait if it needs a value or a shape that the GPU computes. On a CPU
nothing waits, but the same calls are made. They are counted here, with the line of code that made each.

All tensors look alike on a CPU. So a tensor counts as one on the GPU, with the exceptions that hold on a GPU too:

- What torch makes without a `device`, and all that is computed from such tensors only, is on the host until `.to(device)`.
  That copy counts, unless it is `non_blocking`. So does an operation on tensors of both, which fails on a GPU.
- An optimizer counts its steps on the host.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

WAITING_OPERATIONS = {
    "_local_scalar_dense": ".item()",  # also of bool, int, float, range and format
    "_unique": "unique",
    "_unique2": "unique",
    "allclose": "allclose",
    "bincount": "bincount",
    "equal": "equal",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
}
"""Operations of ATen for which the host waits, and what they are called."""
WAITING_METHODS: dict[Any, str] = {
    Tensor.tolist: ".tolist()",
    Tensor.cpu: ".cpu()",
    Tensor.numpy: ".numpy()",
    Tensor.__array__: ".numpy()",
}
"""Calls for which the host waits, and that reach no operation on a CPU."""
FACTORIES = (torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)
"""Functions whose result is on the host, unless they get a device."""
NO_KERNEL = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
"""Operations, besides views, that launch no kernel."""
BOTH_DEVICES = "tensors on both devices, an error on a GPU"
ATTENTION = ("varlen_attn", "flash_attn")
"""Parts of the names of attention operations that do not pass through `scaled_dot_product_attention`."""


@dataclass(frozen=True)
class Synchronisation:
    """A call for which the host waits for the GPU."""

    kind: str
    """What was called, such as .item()."""
    where: str
    """File and line that called it. Torch's own files are left out."""

    def __str__(self) -> str:
        return f"{self.kind} in {self.where}"


class OperationCounts:
    """Context manager that counts the operations in it, in forward and backward passes."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        """How often each operation of ATen ran that launches a kernel, by name."""
        self.attention = 0
        """Number of attention calls in forward passes, also of those that checkpointing repeats."""
        self.synchronisations: list[Synchronisation] = []
        self._modes = (_Functions(self), _Operations(self))
        self._on_host = WeakTensorKeyDictionary()

    @property
    def launches(self) -> int:
        """Number of operations that launch a kernel. Most launch one."""
        return sum(self.operations.values())

    @property
    def num_synchronisations(self) -> int:
        """Number of calls for which the host waits."""
        return len(self.synchronisations)

    def report(self) -> str:
        """Return the synchronisations, the most frequent first, one per line."""
        return "\n".join(f"{number}x {call}" for call, number in Counter(self.synchronisations).most_common())

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def mark_on_host(self, results: Any) -> None:
        """Record that these tensors are on the host."""
        for tensor in _tensors(results):
            self._on_host[tensor] = True

    def is_on_host(self, *values: Any) -> bool:
        """True if there are tensors, all on the host."""
        tensors = _tensors(values)
        return bool(tensors) and all(tensor in self._on_host for tensor in tensors)

    def copy_to_device(self, tensor: Tensor, *, non_blocking: bool) -> Tensor:
        """Copy a host tensor to the device. On a CPU, it is another name for it."""
        if not non_blocking:
            self.wait("a copy to the device")
        copy = tensor.detach()
        self._on_host.pop(copy, None)
        return copy

    def wait(self, kind: str) -> None:
        """Record that the host waits here."""
        where = _caller(sys._getframe(1))
        if where is not None:
            self.synchronisations.append(Synchronisation(kind, where))


class _Functions(TorchFunctionMode):
    """Sees what Python calls, including what reaches no operation on a CPU."""

    def __init__(self, counts: OperationCounts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, counts = kwargs or {}, self.counts
        if func is F.scaled_dot_product_attention:
            counts.attention += 1
        elif func in WAITING_METHODS and not counts.is_on_host(args[0]):
            counts.wait(WAITING_METHODS[func])
        elif func is Tensor.to:
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            if counts.is_on_host(args[0]) and isinstance(target, (torch.device, Tensor)):
                return counts.copy_to_device(func(*args, **kwargs), non_blocking=kwargs.get("non_blocking", False))
            if isinstance(target, str) and target == "cpu":
                counts.wait(".to('cpu')")
        elif func in (torch.tensor, torch.as_tensor) and _copies_from_host(args, kwargs):
            counts.wait("torch.tensor on a device")
        result = func(*args, **kwargs)
        if func in FACTORIES and kwargs.get("device") is None:
            counts.mark_on_host(result)
        return result


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _copies_from_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if numbers are copied to a device, from memory that is not pinned."""
    return isinstance(kwargs.get("device"), torch.device) and not isinstance(args[0], Tensor)


class _Operations(TorchDispatchMode):
    """Sees the operations of ATen, in backward passes too."""

    def __init__(self, counts: OperationCounts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, counts = kwargs or {}, self.counts
        if counts.is_on_host(args, kwargs):
            result = func(*args, **kwargs)
            counts.mark_on_host(result)
            return result
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in NO_KERNEL:
            counts.operations[name] += 1
        if any(part in name for part in ATTENTION) and "backward" not in name:
            counts.attention += 1
        kind = WAITING_OPERATIONS.get(name) or self._kind(name, func, args, kwargs)
        if kind is not None:
            counts.wait(kind)
        return func(*args, **kwargs)

    def _kind(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What the host waits for if the arguments decide it: the number of True values or of repeats, or a copy."""
        if name.removesuffix("_") in ("index", "index_put") and self.counts.is_on_host(args[0]):
            return BOTH_DEVICES
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            fills = name != "index" and args[2].ndim == 0  # x[mask] = number is masked_fill, which does not wait
            if any(self.counts.is_on_host(index) for index in indices):
                return "an index that is on the host"
            masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            return "a boolean mask as an index" if masked and not fills else None
        if any(tensor.ndim and self.counts.is_on_host(tensor) for tensor in _tensors((args, kwargs))):
            return "a copy to the device" if name == "copy_" else BOTH_DEVICES
        if name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
            return "repeat_interleave without output_size"
        return None


def _caller(frame: FrameType | None) -> str | None:
    """Innermost file and line outside of torch, or None if an optimizer reads its count of steps."""
    innermost = None
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/optim/" in path:
            return None
        if path != __file__:
            innermost = innermost or frame
            if "/site-packages/torch/" not in path and not path.startswith("<"):
                innermost = frame
                break
        frame = frame.f_back
    assert innermost is not None
    path = innermost.f_code.co_filename.rpartition("/site-packages/")[2]
    root = f"{Path(__file__).parents[1]}/"
    return f"{path.removeprefix(root)}:{innermost.f_lineno}"
