"""Values with tensors of any shape in safetensors files, which are mapped into memory and read one value at a time.

A value is made of dicts, lists, plain values and tensors. It has a checksum, which is compared when it is read. A file is
written under a temporary name and then renamed, so an interrupted run continues after the last complete one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_mm.files.cache_folder import create_cache
from dpo_mm.files.checksums import saved_shards
from dpo_mm.files.content_key import content_hash
from dpo_mm.files.outputs import remove_stale_files
from dpo_mm.files.resumable import atomic_write
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.process.process_rank import process_rank
from dpo_mm.training.shared_work import wait_for_files

OPEN = 256
"""Files that are open at a time. A process may have about a thousand open files."""


class Stored(NamedTuple):
    """One value without its tensors, the names of its tensors in the file, and its checksum."""

    outline: Any
    tensors: list[str]
    checksum: str


def write_values(path: Path, values: Sequence[Any]) -> None:
    """Write values into one file.

    Raises:
        OSError: if the disk is full or the folder cannot be written, with the fix.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    outlines = {}
    for number, value in enumerate(values):
        outline, parts = _take_apart(value)
        named = {f"{number}.{index}": part.detach().cpu().contiguous().clone() for index, part in enumerate(parts)}
        tensors |= named
        stored = Stored(outline, list(named), content_hash([outline, *named.values()]))
        outlines[str(number)] = json.dumps(stored)
    with atomic_write(path, fix="free space or set DPO_MM_CACHE") as temporary:
        save_file(tensors or {"empty": torch.zeros(0)}, temporary, metadata=outlines)


def read_value(path: Path, number: int) -> Any:
    """Read one value of a file.

    Raises:
        ValueError: if the file is missing or has changed since it was written. Then it is removed.
    """
    try:
        file, outlines = _open(path)
        stored = Stored(*json.loads(outlines[str(number)]))
        tensors = [file.get_tensor(name) for name in stored.tensors]
        if content_hash([stored.outline, *tensors]) == stored.checksum:
            return _put_together(stored.outline, tensors)
    except MemoryError:
        raise
    except Exception as error:  # safetensors and json raise all kinds of errors for changed bytes
        reason: Exception | None = error
    else:
        reason = None
    _open.cache_clear()
    path.unlink(missing_ok=True)
    raise ValueError(
        f"{path} is missing or has changed since it was written, and is removed. Run the same command again: it is computed again"
    ) from reason


@functools.lru_cache(maxsize=OPEN)
def _open(path: Path) -> tuple[Any, dict[str, str]]:
    from safetensors import safe_open

    file = safe_open(path, "pt")
    return file, file.metadata()


def _take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Return a value in which tensors are replaced by their numbers, and the tensors."""
    tensors: list[Tensor] = []

    def outline(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part)
            return ["tensor", len(tensors) - 1]
        if isinstance(part, dict):
            return ["dict", {name: outline(each) for name, each in part.items()}]
        if isinstance(part, list | tuple):
            return ["list", [outline(each) for each in part]]
        return ["value", part]

    return outline(value), tensors


def _put_together(outline: Any, tensors: Sequence[Tensor]) -> Any:
    kind, content = outline
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _put_together(part, tensors) for name, part in content.items()}
    return [_put_together(part, tensors) for part in content] if kind == "list" else content


def shard_parts(folder: Path, rows: int, rows_per_shard: int) -> list[tuple[Path, range]]:
    """Return the file of each shard and the numbers of its rows."""
    parts = [range(start, min(start + rows_per_shard, rows)) for start in range(0, rows, rows_per_shard)]
    return [(folder / f"rows-{number:05}.safetensors", part) for number, part in enumerate(parts)]


def write_shards(folder: Path, rows: int, rows_per_shard: int, compute: Callable[[range], Sequence[Any]]) -> list[Path]:
    """Write the values of rows that are not there yet. Every process writes its part, and waits for the others'.

    Args:
        folder: of the shards.
        rows: number of rows.
        rows_per_shard: rows per file.
        compute: returns the values to store for these rows.

    Returns:
        The files, in order.

    Raises:
        ValueError: if the shards of another process do not come.
    """
    shards = shard_parts(folder, rows, rows_per_shard)
    create_cache(folder)
    remove_stale_files(folder.glob(".*"), shared=True)
    with stop_on_signal(lambda: saved_shards(folder)):
        for path, part in (shards[number] for number in process_rank().share(len(shards))):
            if not path.exists():
                write_values(path, compute(part))
        paths = [path for path, _ in shards]
        wait_for_files(paths, folder)
    return paths
