"""Count operations and host synchronisations of a step, without a GPU.

    with OperationCounts() as counts:
        step()
    assert counts.num_synchronisations <= 2, counts.report()

On a GPU, the host queues kernels and runs ahead of it. It has to wait if it needs a value or a shape that the GPU computes. On a CPU
nothing waits, but the same calls are made. They are counted here, with the line of code that made each.

All tensors look alike on a CPU, so each tensor counts as one on the GPU. Numbers that stay on the host on purpose are Python
numbers and tuples, made by the collator. There are two exceptions: an optimizer's count of its steps, which torch holds on
the host, and `torch.tensor` without a device.
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
NO_KERNEL = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
"""Operations, besides views, that launch no kernel."""
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
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.counts.attention += 1
        elif func in WAITING_METHODS:
            self.counts.wait(WAITING_METHODS[func])
        elif func is Tensor.to and "cpu" in [to for to in (*args[1:2], kwargs.get("device")) if isinstance(to, str)]:
            self.counts.wait(".to('cpu')")
        elif func in (torch.tensor, torch.as_tensor) and _copies_from_host(args, kwargs):
            self.counts.wait("torch.tensor on a device")
        return func(*args, **kwargs)


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
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in NO_KERNEL:
            self.counts.operations[name] += 1
        if any(part in name for part in ATTENTION) and "backward" not in name:
            self.counts.attention += 1
        kind = WAITING_OPERATIONS.get(name) or _mask_or_count(name, func, args, kwargs)
        if kind is not None:
            self.counts.wait(kind)
        return func(*args, **kwargs)


def _mask_or_count(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What the host waits for if the arguments decide it: the number of True values, or of repeats."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        fills = name != "index" and args[2].ndim == 0  # x[mask] = number is masked_fill, which does not wait
        return "a boolean mask as an index" if masked and not fills else None
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
