"""Encoded rows as Arrow datasets in a folder, one shard at a time.

A shard is written to a temporary folder and then renamed. It has one dataset for each size (width x height) that its rows
were fitted to, or none if no row remained. A tensor is stored as the bytes of one cell, in float32 or half precision, with
its type and shape in tensors.json. Nested lists took 14 times as long to read.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_mm.files.checksums import COMPLETE, FIELD
from dpo_mm.files.content_key import content_hash
from dpo_mm.files.resumable import explain_unwritten, temporary_path

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = "tensors.json"
OPEN = 256
"""Datasets that are open at a time. A process may have about a thousand open files."""


class Part(NamedTuple):
    """One dataset of a shard: its path in the folder, its number of rows, and their size (width x height)."""

    path: str
    rows: int
    size: str


class Shards:
    """Rows of all parts, in order, with tensors of the stored type. A part is opened when one of its rows is read."""

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        self.folder, self.parts = folder, list(parts)
        self.ends = np.cumsum([part.rows for part in self.parts])
        self.opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        which = int(np.searchsorted(self.ends, number, side="right"))
        path = self.folder / self.parts[which].path
        try:
            rows, tensors = self._open(which)
            row = rows[int(number - self.ends[which]) + self.parts[which].rows]
            changed = row.pop(FIELD) != _checksum(row, tensors)
        except Exception as error:  # Arrow, datasets and json raise all kinds of errors for changed bytes
            if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise
            changed = True
        if changed:
            raise _remove(path, self.folder)
        return {name: _tensor(value, *tensors[name]) if name in tensors else value for name, value in row.items()}

    def _open(self, which: int) -> tuple[Any, dict[str, tuple[str, list[int]]]]:
        from datasets import load_from_disk

        if which not in self.opened:
            if len(self.opened) >= OPEN:
                self.opened.pop(next(iter(self.opened)))
            path = self.folder / self.parts[which].path
            rows = load_from_disk(str(path))
            rows.data.validate(full=True)  # changed offsets would make Arrow read outside of the file
            self.opened[which] = rows, json.loads((path / TENSORS).read_text(encoding="utf-8"))
        return self.opened[which]


def _checksum(row: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Hash of a stored row, with the types and shapes of its tensors."""
    return content_hash([row, {name: list(kind) for name, kind in tensors.items()}])


def _remove(path: Path, folder: Path) -> ValueError:
    """Remove a changed shard, so that the next run encodes its rows again, and return the error."""
    shutil.rmtree(path.parent, ignore_errors=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    return ValueError(
        f"{path.parent} has changed since it was written, and is removed. Run the same command again: its rows are "
        "encoded again"
    )


def _tensor(data: bytes, kind: str, shape: list[int]) -> Tensor:
    """Restore a tensor from the bytes of a cell. The device casts half precision, so that half the bytes are moved."""
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, kind)).reshape(shape)


def cast_columns(columns: Mapping[str, Any], precision: str, *, where: str) -> dict[str, Any]:
    """Cast tensors to the precision of the cache.

    Args:
        columns: columns by name. Tensors are (rows, ...).
        precision: fp32, bf16 or fp16.
        where: name of the dataset, for errors.

    Raises:
        ValueError: if a value is not finite, or too large for fp16.
    """
    cast = dict(columns)
    for name, values in columns.items():
        if isinstance(values, Tensor) and values.is_floating_point():
            if not values.isfinite().all():
                raise ValueError(
                    f"{where}: {name} is not finite after encoding. An encoder overflows in half precision or has broken "
                    "weights: train with precision fp32 or bf16"
                )
            is_half = precision == "fp32" and values.element_size() < 4  # a wider type would add zeros only
            cast[name] = values if is_half else values.to(CACHE_DTYPES[precision])
            if precision == "fp16" and cast[name].isinf().any():
                largest = values.abs().max().item()
                raise ValueError(f"{where}: {name} is too large for fp16 ({largest:.3g}); take cache_precision bf16")
    return cast


def write_shard(path: Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the datasets of a shard to a temporary folder, then rename it.

    Raises:
        OSError: if the disk is full or the folder cannot be written, with the fix.
    """
    temporary = temporary_path(path)
    try:
        with explain_unwritten(path, fix="Free space or set DPO_MM_CACHE"):
            temporary.mkdir(parents=True)
            for name, columns in sets.items():
                _arrow(columns).save_to_disk(str(temporary / name))
                (temporary / name / TENSORS).write_text(json.dumps(_kinds(columns)), encoding="utf-8")
            temporary.rename(path)
    except OSError:
        if not path.exists():  # else another run on the same rows was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _arrow(columns: Mapping[str, Any]) -> Any:
    """Make a dataset of columns: tensors (rows, ...) as bytes, lists of plain values unchanged."""
    from datasets import Dataset, Features, Value

    kinds = {str: "string", int: "int64", float: "float64", bytes: "large_binary"}
    plain = {
        name: _bytes(values) if isinstance(values, Tensor) else [type(values[0])(value) for value in values]
        for name, values in columns.items()
    }
    rows = [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]
    plain[FIELD] = [_checksum(row, _kinds(columns)) for row in rows]
    return Dataset.from_dict(plain, features=Features({k: Value(kinds[type(v[0])]) for k, v in plain.items()}))


def _bytes(tensor: Tensor) -> list[bytes]:
    return [row.contiguous().flatten().view(torch.uint8).numpy().tobytes() for row in tensor]


def _kinds(columns: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    tensors = {name: values for name, values in columns.items() if isinstance(values, Tensor)}
    return {name: (str(v.dtype).removeprefix("torch."), list(v.shape[1:])) for name, v in tensors.items()}


def list_parts(folder: Path, kind: str) -> Iterator[Part]:
    """Yield the parts of all shards of a kind (pairs, prompts), in order."""
    from datasets import load_from_disk

    for shard in sorted(folder.glob(f"{kind}-*")):
        for path in sorted(shard.iterdir()):
            try:
                rows = len(load_from_disk(str(path)))
            except Exception as error:
                if isinstance(error, MemoryError):
                    raise
                raise _remove(path, folder) from error
            yield Part(str(path.relative_to(folder)), rows, path.name)


def row_bytes(columns: Mapping[str, Tensor], precision: str) -> int:
    """Return the bytes that the tensors of one row take on disk. Columns are (rows, ...)."""
    widest = CACHE_DTYPES[precision].itemsize
    sizes = (
        (v[0].numel(), min(widest, v.element_size()) if v.is_floating_point() else v.element_size())
        for v in columns.values()
    )
    return sum(count * size for count, size in sizes)


def check_disk(folder: Path, wanted: int, *, less: str = "halve it with cache_precision bf16") -> int:
    """Return the free bytes of the folder's disk.

    Args:
        folder: an existing folder.
        wanted: bytes to write.
        less: how to write fewer bytes.

    Raises:
        ValueError: if there are fewer free bytes than wanted.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ValueError(
            f"encoding takes about {gib(wanted)} and {folder} has {gib(free)} free; free space, set DPO_MM_CACHE to another "
            f"disk, or {less}"
        )
    return free


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
