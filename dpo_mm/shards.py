"""Encoded rows as Arrow sets in a folder, a shard at a time: written aside and then renamed, opened as they are asked for.

A shard is a folder with a set for each frame (width x height) that its rows were fitted to, or none where no row was left.
Numbers are kept as float32, or halved: float16 as it is, bfloat16 (which Arrow lacks) as the int16 of the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PRECISIONS = ("fp32", "bf16", "fp16")
OPEN = 256
"""Sets that are kept open at a time; a process may have about a thousand files."""


class Part(NamedTuple):
    """One set of a shard: its folder under the whole's, its rows, and what they were fitted to (width x height)."""

    place: str
    rows: int
    frame: str


class Shards:
    """Rows of all parts, in order, as torch tensors in float32. A part is opened when a row of it is asked for."""

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        self.folder, self.parts = folder, list(parts)
        self.ends = np.cumsum([part.rows for part in self.parts])
        self.opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        which = int(np.searchsorted(self.ends, number, side="right"))
        rows = self._open(which)
        row = rows[int(number - self.ends[which]) + self.parts[which].rows]
        return {name: _whole(value, rows.features[name]) for name, value in row.items()}

    def _open(self, which: int) -> Any:
        from datasets import load_from_disk

        if which not in self.opened:
            if len(self.opened) >= OPEN:
                self.opened.pop(next(iter(self.opened)))
            self.opened[which] = load_from_disk(str(self.folder / self.parts[which].place)).with_format("numpy")
        return self.opened[which]


def _whole(value: Any, feature: Any) -> Any:
    """A cell as it was before it was kept: tensors in float32, ids and masks as they are."""
    if not isinstance(value, np.ndarray):
        return value
    if getattr(feature, "feature", feature).dtype == "int16":
        return torch.from_numpy(value.astype(np.int16)).view(torch.bfloat16).float()
    tensor = torch.from_numpy(value.copy())
    return tensor.float() if tensor.is_floating_point() else tensor


def halved(columns: Mapping[str, Any], precision: str, *, where: str) -> dict[str, Any]:
    """Columns as they are kept. Raises ValueError where a number is too large for float16."""
    found = dict(columns)
    for name, values in columns.items():
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or precision == "fp32":
            continue
        if precision == "bf16":
            found[name] = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
        else:
            found[name] = values.astype(np.float16)
            if not np.isfinite(found[name]).all() and np.isfinite(values).all():
                raise ValueError(
                    f"{where}: {name} is too large for fp16 ({np.abs(values).max():.3g}); take cache_precision bf16"
                )
    return found


def keep(place: Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a shard's sets of columns, aside and then under its name. Raises OSError with the fix where it can't."""
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, columns in sets.items():
            _arrow(columns).save_to_disk(str(aside / name))
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            error.errno, f"could not write {place}: {error.strerror or error}; free space or set DPO_MM_CACHE"
        ) from error
    try:
        aside.rename(place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(aside, ignore_errors=True)  # another run on the same rows was faster


def _arrow(columns: Mapping[str, Any]) -> Any:
    from datasets import Array2D, Array3D, Dataset, Features, List, Value

    kinds: dict[str, Any] = {}
    arrays = {2: Array2D, 3: Array3D}
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            shape, kind = values.shape[1:], str(values.dtype)
            kinds[name] = (
                arrays[len(shape)](shape, kind) if len(shape) in arrays else List(Value(kind), length=shape[0])
            )
        else:
            kinds[name] = Value({str: "string", int: "int64", float: "float64"}[type(values[0])])
    return Dataset.from_dict({k: list(v) for k, v in columns.items()}, features=Features(kinds))


def parts_of(folder: Path, kind: str) -> Iterator[Part]:
    """What the shards of a kind (pairs, prompts) hold, in order."""
    from datasets import load_from_disk

    for shard in sorted(folder.glob(f"{kind}-*")):
        for place in sorted(shard.iterdir()):
            yield Part(str(place.relative_to(folder)), len(load_from_disk(str(place))), place.name)


def row_bytes(columns: Mapping[str, Any], precision: str) -> int:
    """Bytes that a row of such columns takes on disk, (rows, ...) each, about."""
    size = 0
    for values in columns.values():
        if isinstance(values, np.ndarray):
            halves = values.dtype == np.float32 and precision != "fp32"
            size += values[0].size * (2 if halves else values.dtype.itemsize)
    return size


def check_disk(folder: Path, wanted: int) -> int:
    """Free bytes where the folder is. Raises ValueError where they are fewer than wanted."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ValueError(
            f"encoding takes about {gib(wanted)} and {folder} has {gib(free)} free; free space, set DPO_MM_CACHE to another "
            "disk, or halve it with cache_precision bf16"
        )
    return free


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
