"""Figures of a training step: time, memory, kernels, synchronisations and attention kernels, on a GPU or, for tests, a CPU."""

from __future__ import annotations

import collections
import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dpo_mm.training.memory_estimate import PeakMemoryMode
from tests.operation_counts import OperationCounts

Step = Callable[[], float]
ATTENTION = ("attention", "flash", "fmha", "cudnn_generated", "sdpa", "softmax")
"""Parts of the names of kernels that belong to attention."""
MIB = 2**20


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Seconds of a call until the GPU has finished its work."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def allocated(device: str) -> int | None:
    """Bytes of all tensors on the GPU. None on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else None


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Largest number of bytes of the tensors that a call makes, by the GPU's allocator or, on a CPU, by counting."""
    if device != "cuda":
        with PeakMemoryMode() as counted:
            function()
        return counted.peak
    synchronise(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    synchronise(device)
    return torch.cuda.max_memory_allocated() - before


def count_kernels(function: Callable[[], Any], device: str) -> dict[str, Any]:
    """Profile a call.

    Returns:
        kernels: how many ran, without copies. kernel_ms: their time. copies: of memory, and fills. attention_kernels: count and ms of
        those whose name contains one of ATTENTION. longest: the ten names that took longest. On a CPU these are operations.
    """
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        function()
        synchronise(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    counts: dict[str, int] = collections.Counter()
    times: dict[str, float] = collections.defaultdict(float)
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    for event in results.events():  # key_averages takes a minute for 100,000 kernels
        if event.device_type() == kind and not event.is_user_annotation():
            counts[event.name()] += 1
            times[event.name()] += event.duration_ns() / 1e6
    copies = [name for name in counts if name.lower().startswith(("memcpy", "memset", "aten::copy_"))]
    kernels = [name for name in counts if name not in copies]
    row = lambda name: {"name": name[:120], "count": counts[name], "ms": times[name]}
    attention = [name for name in kernels if any(word in name.lower() for word in ATTENTION)]
    return {
        "kernels": sum(counts[name] for name in kernels),
        "kernel_ms": sum(times[name] for name in kernels),
        "copies": sum(counts[name] for name in copies),
        "attention_kernels": [row(name) for name in sorted(attention, key=times.__getitem__, reverse=True)],
        "longest": [row(name) for name in sorted(kernels, key=times.__getitem__, reverse=True)[:10]],
    }


def count_synchronisations(function: Callable[[], Any], device: str) -> dict[str, int]:
    """Lines of Python at which a call waits for the GPU, or would wait if there was one, and how often."""
    if device != "cuda":
        with OperationCounts() as counted:
            function()
        return dict(collections.Counter(call.where for call in counted.synchronisations).most_common())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{_place(w.filename)}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return dict(collections.Counter(places).most_common())


def _place(file: str) -> str:
    return "/".join(Path(file).parts[-3:])


def step_figures(step: Step, device: str, *, rounds: int, clear: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measure a step, on a GPU after two steps that are not measured.

    Args:
        step: forward and backward pass. It returns the loss, which is one synchronisation.
        device: cpu or cuda.
        rounds: steps whose time is measured.
        clear: frees the gradients.

    Returns:
        loss: of the first step. first_s: its seconds. ms, all_ms: median and times of the rounds. peak_mib: what a step adds.
        weights_mib: what was there before. The figures of `count_kernels`. synchronisations: their number by line.
    """
    losses: list[float] = []
    first = seconds_of(lambda: losses.append(step()), device)
    clear()
    if device == "cuda":  # the first step chooses kernels
        step()
        clear()
    times = []
    for _ in range(rounds):
        times.append(1000 * seconds_of(step, device))
        clear()
    free_memory(device)
    before = allocated(device)
    figures = {
        "loss": losses[0],
        "first_s": first,
        "ms": statistics.median(times),
        "all_ms": times,
        "weights_mib": None if before is None else before / MIB,
        "peak_mib": peak_bytes(step, device) / MIB,
    }
    clear()
    try:
        figures |= count_kernels(step, device)
    except Exception as error:  # times and memory are there without the profiler
        figures["profiler_error"] = f"{type(error).__name__}: {error}"[:300]
    clear()
    figures["synchronisations"] = count_synchronisations(step, device)
    clear()
    return figures


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Context manager in which float32 is not rounded to TF32. From torch 2.9 it has settings that do not mix with the old ones."""
    if hasattr(torch.backends.cudnn, "conv"):
        name, exact = "fp32_precision", "ieee"
        backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    else:
        name, exact = "allow_tf32", False
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [getattr(backend, name) for backend in backends]
    for backend in backends:
        setattr(backend, name, exact)
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, name, value)
