"""Wait for the shards that other processes of a run write into a folder that all of them see."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

SHARD_TIMEOUT_S = 1800.0
"""Seconds without a new shard after which a process stops waiting for the others."""


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
