"""Reference log-probs of responses on disk, so that a resumed run, or another on the same pairs, computes none.

The name of the folder is a hash of all that decides the values, see `dpo_mm.files.content_key`. The rows are in shards, which several
processes write together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_mm.files.content_key import content_key, library_versions, lora_scales
from dpo_mm.policies.lora_layers import FROZEN
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.training.tensor_shards import read_value, shard_parts, write_shards

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 256


def frozen_output_key(work: str, policy: TextPolicy, rows: Any, settings: str) -> str:
    """Hash all that decides what the frozen part of a model computes for rows.

    Args:
        work: a key of `dpo_mm.files.content_key.INGREDIENTS`, the kind of output.
        policy: the prepared policy.
        rows: encoded rows.
        settings: further settings of the run that decide it.
    """
    parts = {
        "model": policy.fingerprint(),
        "adapter": start_adapter(policy),
        "rows": getattr(rows, "content_digest", None) or list(rows),
        "settings": settings,
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type,
        "libraries": library_versions(),
    }
    return content_key(work, parts)


def start_adapter(policy: TextPolicy) -> Any:
    """Return weights and scales of the adapter from which the policy starts, None if it starts at the model."""
    frozen = {name: tensor for name, tensor in policy.model.state_dict().items() if f".{FROZEN}" in name}
    return [frozen, lora_scales(policy.model)] if frozen else None


def load_or_compute(folder: Path, rows: int, compute: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read the values of all rows, and compute the missing ones. A shard that has changed is computed again.

    Args:
        folder: of the shards.
        rows: number of rows.
        compute: returns the values of some rows by name, with rows first.

    Returns:
        The values by name, with rows first.
    """
    for path, _ in shard_parts(folder, rows, ROWS_PER_SHARD):
        if path.exists():
            try:
                read_value(path, 0)
            except ValueError as error:
                logger.warning("%s", error)
    paths = write_shards(folder, rows, ROWS_PER_SHARD, lambda part: [compute(part)])
    values = [read_value(path, 0) for path in paths]
    return {name: torch.cat([value[name] for value in values]) for name in values[0]}
