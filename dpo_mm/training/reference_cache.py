"""Reference log-probs of responses on disk, so that a resumed run, or another on the same pairs, computes none.

The file name is a hash of all that decides the values: weights, processor, template, token weights, and every row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.resumable import atomic_write


def cache_path(policy: TextPolicy, rows: Any, folder: Path, *, precision: str) -> Path:
    """Path of the log-probs of these rows under these weights.

    Args:
        policy: the prepared policy.
        rows: as `policy.encode` returns them.
        folder: the cache.
        precision: of the run.
    """
    digest = hashlib.sha256(
        f"{policy.fingerprint()} {precision} {policy.ld_alpha} {policy.edited_token_weight} v1".encode()
    )
    for row in rows:
        for part in _bytes(row):
            digest.update(part)
    return folder / "reference" / f"{digest.hexdigest()[:32]}.safetensors"


def _bytes(value: Any) -> Iterator[bytes]:
    """Serialise a row in a fixed order, names and shapes included."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for name in sorted(value):
            yield name.encode()
            yield from _bytes(value[name])
    elif isinstance(value, list):
        for one in value:
            yield from _bytes(one)
    else:
        yield repr(value).encode()


def load(place: Path) -> dict[str, Tensor] | None:
    """Load what `save` wrote: chosen and rejected, (rows, 1), nats. None if there is no file."""
    from safetensors.torch import load_file

    return load_file(place) if place.exists() else None


def save(place: Path, *, chosen: Tensor, rejected: Tensor) -> None:
    """Save log-probs to a temporary file, then rename it."""
    from safetensors.torch import save_file

    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place, fix="free space or set DPO_MM_CACHE") as beside:
        save_file({"chosen": chosen, "rejected": rejected}, beside)
