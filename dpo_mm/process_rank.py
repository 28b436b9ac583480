"""Rank of this process among those of `torchrun` or `accelerate launch`, and its part of a job."""

from __future__ import annotations

import os
from dataclasses import dataclass


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
