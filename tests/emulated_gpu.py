"""Run the code for a GPU without one: tensors that say they are on cuda:0, with their values on the CPU.

    with emulated_gpu():
        train(config)  # takes all branches for CUDA

An operation on tensors of both devices fails as on a GPU. The exceptions are torch's: tensors without dimensions, and indices. The
CPU computes, so a run has the bits of a run on the CPU if it uses the same precision and the same kernels. That shows tensors on the
wrong device and branches for CUDA that compute something else. It shows nothing about the GPU's own kernels, their rounding and
their speed, about memory, or about what a step waits for (`operation_counts` counts that).

Not emulated: loader workers and pinned memory (left out), streams, and kernels without a version for CPUs, such as attention of
variable length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CAPABILITY = (9, 0)
CARD = SimpleNamespace(name="emulated GPU", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor, aten._unsafe_index_put.default)  # fmt: skip
"""Operations that take indices on the host."""
MAKES_TENSORS = (torch.tensor, torch.as_tensor, torch.asarray)
LOADER_OPTIONS = (
    "pin_memory",
    "num_workers",
    "prefetch_factor",
    "persistent_workers",
    "multiprocessing_context",
    "worker_init_fn",
)
_moves: list[None] = []
"""Not empty while Python moves a tensor. C++ names the CPU by itself, because it sees the values' device."""


class EmulatedTensor(Tensor):
    """A tensor on the emulated GPU. For C++ it is a tensor on the CPU, for Python on cuda:0."""

    values: Tensor
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[EmulatedTensor], values: Tensor) -> EmulatedTensor:
        tensor: EmulatedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CPU,
        )
        tensor.values = values
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"EmulatedTensor({self.values!r})"

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = EmulatedTensor(values_of(self).clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def values_of(tensor: Any) -> Any:
    """The values of a tensor on the emulated GPU, on the CPU. Anything else is returned unchanged."""
    return tensor.detach().values if isinstance(tensor, EmulatedTensor) else tensor


# Operations


def _unwrapped(value: Any) -> Any:
    return value.values if isinstance(value, EmulatedTensor) else value


def _wrapped(value: Any) -> Any:
    return EmulatedTensor(value) if isinstance(value, Tensor) and not isinstance(value, EmulatedTensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU. Its results are on the emulated GPU if its tensors are, or if it names that device."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)]
    if func is aten._pin_memory.default:
        return tensors[0]
    if func is aten.is_pinned.default:
        return False
    if ours and func in (aten._conj.default, aten._neg_view.default):  # flags of a tensor that C++ reads
        return _wrapped(func(args[0].values).resolve_conj().resolve_neg())
    device = kwargs.get("device")
    on_gpu, names_device = bool(ours), device is not None
    if names_device:
        kind = torch.device(device).type
        on_gpu = kind == "cuda" or (kind == "cpu" and not _moves and _is_from_cpp(func, bool(ours)))
        kwargs = {**kwargs, "device": CPU if kind == "cuda" else device}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    _check_devices(func, args, tensors, ours)
    if func is aten.histc.default:  # on a CPU, there is none of integers
        args = (args[0].float(), *args[1:])
    result = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if not on_gpu:
        return result
    result = tree_map(_wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours and not names_device else result


def _is_from_cpp(func: Any, takes_ours: bool) -> bool:
    """True if C++ named the CPU by itself: in a cast of a tensor on the emulated GPU, and for new tensors in a backward pass."""
    in_backward = torch._C._current_graph_task_id() != -1
    return (takes_ours and func is aten._to_copy.default) or in_backward


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor], ours: list[Any]) -> None:
    """Raise RuntimeError if an operation takes tensors of both devices."""
    if not ours or func in (aten.copy_.default, aten._to_copy.default):
        return
    on_host = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.dim() > 0]
    if func in INDEXING:
        on_host = [] if isinstance(args[0], EmulatedTensor) else [args[0]]
    if on_host:
        shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {shapes}")


class _Operations(TorchDispatchMode):
    """Makes new tensors on the emulated GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# Functions that reach no operation, or of which C++ would ask the driver


class _Functions(TorchFunctionMode):
    """Moves tensors between the devices, and reads and replaces values as Python does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda) and isinstance(first, Tensor):
            return _move(func, first, args[1:], kwargs)
        if func in MAKES_TENSORS and kwargs.get("device") is not None:
            return _make(func, args, kwargs)
        if func in (Tensor.pin_memory, Tensor.is_pinned):
            return first if func is Tensor.pin_memory else False
        if func is torch._C._nn.pad_sequence:  # type: ignore[attr-defined]
            return _pad_sequence(*args, **kwargs)
        if isinstance(first, EmulatedTensor):
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                func(*args)
                first.values = args[1].values
                return None
            if func is Tensor.tolist:
                return values_of(first).tolist()
            if func is nn.functional.one_hot:  # its C++ makes a tensor where it sees the values
                return _wrapped(func(values_of(first), *args[1:], **kwargs))
            if func in (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage):
                return func(values_of(first))
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if func is Tensor.new_tensor:
                return _make(torch.tensor, args[1:], {"dtype": first.dtype, **kwargs, "device": CUDA})
        return func(*tree_map(_with_index, args), **tree_map(_with_index, kwargs))


def _with_index(value: Any) -> Any:
    """cuda:0 for cuda, which C++ would ask the driver for."""
    is_cuda = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"
    return CUDA if is_cuda else value


def _move(func: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given = (*args, *kwargs.values())
    device, dtype = {Tensor.cpu: CPU, Tensor.cuda: CUDA}.get(func), tensor.dtype
    for value in given:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            device = CUDA
    if device is None:
        return func(tensor, *args, **kwargs)
    memory_format, is_there = kwargs.get("memory_format"), device.type == tensor.device.type
    if is_there and dtype == tensor.dtype and not kwargs.get("copy") and memory_format is None:
        return tensor
    _moves.append(None)
    try:
        return aten._to_copy(tensor, dtype=dtype, device=_with_index(device), memory_format=memory_format)
    finally:
        _moves.pop()


def _make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A tensor of numbers, or of tensors without dimensions."""
    device, rest = torch.device(kwargs["device"]), {name: kwargs[name] for name in kwargs if name != "device"}
    if isinstance(args[0], Tensor):
        return _move(Tensor.to, args[0], (device, rest.get("dtype") or args[0].dtype), {})
    return _move(Tensor.to, func(tree_map(values_of, args[0]), *args[1:], **rest), (device,), {})


def _pad_sequence(
    sequences: list[Tensor], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Tensor:
    """As torch's, whose C++ makes a tensor where it sees the values."""
    longest, padded = max(len(sequence) for sequence in sequences), []
    for sequence in sequences:
        missing = longest - len(sequence)
        ends = (0, missing) if padding_side == "right" else (missing, 0)
        padded.append(nn.functional.pad(sequence, (0, 0) * (sequence.dim() - 1) + ends, value=padding_value))
    return torch.stack(padded, 0 if batch_first else 1)


# What knows the device


class _Generator(torch.Generator):
    """A generator for any device. The values are made on the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, device="cpu")

    def __init__(self, device: Any = "cpu") -> None:
        pass


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move or cast a module, as `nn.Module._apply`. A parameter keeps its identity unless it changes its device."""
    new: dict[int, Any] = {}
    with torch.no_grad():
        for module in self.modules() if recurse else [self]:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in new:
                        new[id(parameter)] = _applied(parameter, fn)
                    module._parameters[name] = new[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fn(buffer)
    return self


def _applied(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> Any:
    result = fn(parameter)
    if result is parameter:
        return parameter
    if isinstance(result, EmulatedTensor) == isinstance(parameter, EmulatedTensor):
        parameter.data = result.data
        return parameter
    return nn.Parameter(result.detach(), parameter.requires_grad)


def _also_for_cpu(real: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Autocast for cuda is autocast of the operations on the values."""

    def both(device_type: str, value: Any) -> None:
        real(device_type, value)
        if device_type == "cuda":
            real("cpu", value)

    return both


def _patches() -> Iterator[Any]:
    import safetensors.torch

    nothing, random_state = (lambda *args, **kwargs: None), (lambda *args: torch.zeros(16, dtype=torch.uint8))
    card = {"get_device_properties": CARD, "get_device_name": CARD.name, "get_device_capability": CAPABILITY}
    numbers = {"is_available": True, "is_initialized": True, "is_bf16_supported": True, "current_device": 0, "device_count": 1,
               "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
               "mem_get_info": (CARD.total_memory, CARD.total_memory)}  # fmt: skip
    for name, value in {**card, **numbers}.items():
        yield patch.object(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    for name in ("_lazy_init", "synchronize", "empty_cache", "ipc_collect", "set_device", "reset_peak_memory_stats",
                 "manual_seed", "manual_seed_all", "set_sync_debug_mode"):  # fmt: skip
        yield patch.object(torch.cuda, name, nothing)
    for module in (torch.cuda, torch.cuda.random):
        yield patch.object(module, "get_rng_state", random_state)
        yield patch.object(module, "set_rng_state", nothing)
        yield patch.object(module, "get_rng_state_all", lambda: [])
        yield patch.object(module, "set_rng_state_all", nothing)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device_index": 0,
        "current_accelerator": CUDA,
    }.items():
        yield patch.object(torch.accelerator, name, lambda *args, value=value, **kwargs: value)
    yield patch.object(torch.accelerator, "synchronize", nothing)
    yield patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", nothing)
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        yield patch.object(torch, name, _also_for_cpu(getattr(torch, name)))
    yield patch.object(torch, "Generator", _Generator)
    yield patch.object(nn.Module, "_apply", _apply)
    loader, make_loader = torch.utils.data.DataLoader, torch.utils.data.DataLoader.__init__
    without = lambda options: {name: value for name, value in options.items() if name not in LOADER_OPTIONS}
    yield patch.object(loader, "__init__", lambda self, *args, **options: make_loader(self, *args, **without(options)))
    for module, name in ((safetensors.torch, "save_file"), (torch, "save")):
        save = getattr(module, name)
        yield patch.object(
            module, name, lambda what, *args, save=save, **options: save(tree_map(values_of, what), *args, **options)
        )


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    """Context manager in which torch has one GPU, which is emulated. Models must be made or moved to it inside."""
    import dpo_mm.policies.vlm.prefix_attention as prefix_attention

    def lower_right(queries: int, keys: int) -> Tensor:
        """A mask in place of torch's, which is made on the CPU and not moved."""
        return torch.ones(queries, keys, dtype=torch.bool, device=CUDA).tril(keys - queries)

    with contextlib.ExitStack() as stack:
        for one in _patches():
            stack.enter_context(one)
        stack.enter_context(patch.object(prefix_attention, "causal_lower_right", lower_right))
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield
