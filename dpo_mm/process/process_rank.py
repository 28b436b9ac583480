"""Rank of this process among those of `torchrun` or `accelerate launch`, and its part of a job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

WAIT_TIMEOUT_S = 1800.0
"""Seconds without new work after which a process stops waiting for the others."""


@dataclass(frozen=True)
class ProcessRank:
    """Index of a process (RANK) and the number of processes (WORLD_SIZE)."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """True for the process that writes what all of them share."""
        return self.index == 0

    def share(self, shards: int) -> range:
        """Return the numbers of the shards that this process makes. All commands divide their work so."""
        return range(self.index, shards, self.count)


def process_rank() -> ProcessRank:
    """Return the rank of this process. Without a launcher it is the first of one."""
    return ProcessRank(int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1))


def wait_for_others(
    missing: Callable[[], str | None],
    progress: Callable[[], int],
    *,
    fix: str = "start them again",
    poll_s: float = 0.2,
) -> None:
    """Wait until the other processes have made their parts. There is no time limit for the whole.

    Args:
        missing: returns the name of something that is missing, None at the end.
        progress: returns a number that changes when another process has made something.
        fix: end of the error.
        poll_s: seconds between two looks.

    Raises:
        ValueError: if `progress` does not change for `WAIT_TIMEOUT_S` seconds.
    """
    last, before = time.monotonic(), -1
    while name := missing():
        now = progress()
        last, before = (time.monotonic(), now) if now != before else (last, before)
        if time.monotonic() - last > WAIT_TIMEOUT_S:
            raise ValueError(
                f"{name} has not come for {WAIT_TIMEOUT_S / 60:.0f} minutes; all processes must run and see the same folder, {fix}"
            )
        time.sleep(poll_s)
