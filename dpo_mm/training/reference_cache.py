"""Reference log-probs of answers on disk, so that a run that goes on, or another on the same pairs, asks no reference.

A file is named after all that decides its numbers: weights, processor, template, how tokens are weighed, and every row.
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
    """The file of these rows' log-probs under these weights; rows: as `policy.encode` gives them. precision: of the run."""
    digest = hashlib.sha256(
        f"{policy.fingerprint()} {precision} {policy.ld_alpha} {policy.edited_token_weight} v1".encode()
    )
    for row in rows:
        for part in _bytes(row):
            digest.update(part)
    return folder / "reference" / f"{digest.hexdigest()[:32]}.safetensors"


def _bytes(value: Any) -> Iterator[bytes]:
    """A row's contents in an order of its own, names and shapes included."""
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
    """What `save` wrote: chosen and rejected, (rows, 1), nats; None where it isn't there."""
    from safetensors.torch import load_file

    return load_file(place) if place.exists() else None


def save(place: Path, *, chosen: Tensor, rejected: Tensor) -> None:
    """Keep log-probs, aside and then under their name."""
    from safetensors.torch import save_file

    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place, fix="free space or set DPO_MM_CACHE") as beside:
        save_file({"chosen": chosen, "rejected": rejected}, beside)
