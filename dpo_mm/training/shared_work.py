"""Shards that the processes of a run write together into a folder that all of them see."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SHARD_TIMEOUT_S = 1800.0
"""Seconds without a new shard after which a process stops waiting for the others."""


@dataclass(frozen=True)
class ProcessRank:
    """Index of this process and the number of processes, from the variables of `torchrun` and `accelerate launch`."""

    index: int
    count: int

    @classmethod
    def own(cls) -> ProcessRank:
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def wait_for_files(paths: Iterable[Path], folder: Path) -> None:
    """Wait until all files exist. Polling has no time limit for the whole, unlike a barrier of processes.

    Raises:
        ValueError: if no new file appears for `SHARD_TIMEOUT_S` seconds.
    """
    last, before = time.monotonic(), -1
    missing = [path for path in paths if not path.exists()]
    while missing:
        now = sum(1 for _ in folder.iterdir())
        last, before = (time.monotonic(), now) if now != before else (last, before)
        if time.monotonic() - last > SHARD_TIMEOUT_S:
            raise ValueError(
                f"{missing[0]} has not come for {SHARD_TIMEOUT_S / 60:.0f} minutes; all processes must see the same folder, set "
                "DPO_MM_CACHE to one on a shared disk"
            )
        time.sleep(0.2)
        missing = [path for path in missing if not path.exists()]
