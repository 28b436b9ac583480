"""Reference log-probs of responses on disk, so that a resumed run, or another on the same pairs, computes none.

The file name is a hash of all that decides the values, see `dpo_mm.content_key`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_mm.cache_folder import create_cache
from dpo_mm.checksums import is_intact, write_with_checksum
from dpo_mm.content_key import content_key, library_versions, lora_scales
from dpo_mm.outputs import remove_stale_files
from dpo_mm.policies.lora_layers import FROZEN
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.training.response_rows import StreamedRows


def cache_path(policy: TextPolicy, rows: Any, folder: Path, *, precision: str) -> Path:
    """Path of the log-probs of these rows under these weights.

    Args:
        policy: the prepared policy.
        rows: as `policy.encode` returns them.
        folder: the cache.
        precision: of the run.
    """
    parts = {
        "model": policy.fingerprint(),
        "adapter": _start_adapter(policy),
        "rows": rows.content_digest if isinstance(rows, StreamedRows) else list(rows),
        "settings": precision,
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type,
        "libraries": library_versions(),
    }
    return folder / "reference" / f"{content_key('reference log-probs', parts)}.safetensors"


def _start_adapter(policy: TextPolicy) -> Any:
    """Weights and scales of the adapter from which the policy starts, None if it starts at the model."""
    frozen = {name: tensor for name, tensor in policy.model.state_dict().items() if f".{FROZEN}" in name}
    return [frozen, lora_scales(policy.model)] if frozen else None


def load(place: Path) -> dict[str, Tensor] | None:
    """Load what `save` wrote: chosen and rejected, (rows, 1), nats. None if there is no file or it has changed."""
    from safetensors.torch import load_file

    return load_file(place) if is_intact(place) else None


def save(place: Path, *, chosen: Tensor, rejected: Tensor) -> None:
    """Save log-probs to a temporary file, then rename it."""
    from safetensors.torch import save_file

    create_cache(place.parent)
    remove_stale_files(place.parent.glob(".*"), shared=True)
    with write_with_checksum(place, fix="free space or set DPO_MM_CACHE") as temporary:
        save_file({"chosen": chosen, "rejected": rejected}, temporary)
