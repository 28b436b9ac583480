"""The order of training, as data: index i of a `PairStream` is one visit of one row, whoever asks for it.

One epoch of the stream is the whole run, so resuming is skipping, and no state of a sampler needs keeping.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dpo_mm.policies import draws as drawing


@dataclass(frozen=True)
class PairStream(Dataset[dict[str, Any]]):
    """Rows visited again and again, in a new order each time, a pure function of the seed."""

    rows: Any
    """Encoded pairs, by number."""
    seed: int
    length: int
    draws: int = 0
    """K, the visit that a row's draw is made from runs 0..K-1 and again; 0: every visit is fresh."""
    strata: int = 0
    """So many rows in a row, a step's, draw their timesteps from as many parts of the schedule, one each; of K fixed
    draws, those of a row do so instead. 0: each is drawn by itself."""
    mirrored: bool = False
    """Each visit comes twice in a row, the second time with its noise negated."""
    shuffle: bool = True

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        number, second = divmod(number, 2) if self.mirrored else (number, 0)
        round_, place = divmod(number, len(self.rows))
        row = self.rows[int(_order(self.seed, round_, len(self.rows))[place] if self.shuffle else place)]
        visit = round_ % self.draws if self.draws else round_
        place_in_time = {"stratum": self._stratum(row["id"], visit, number)} if self.strata else {}
        return {**row, "visit": visit, "sign": -1 if second else 1, **place_in_time}

    def _stratum(self, row: str, visit: int, number: int) -> tuple[int, int]:
        """Which part of the schedule, of how many."""
        if self.draws:
            return int(drawing.strata(self.seed, row, self.draws)[visit]), self.draws
        count = max(self.strata // 2, 1) if self.mirrored else self.strata
        step, place = divmod(number, count)
        return int(_order(self.seed, -1 - step, count)[place]), count


@functools.lru_cache(maxsize=8)
def _order(seed: int, visit: int, count: int) -> np.ndarray:
    """A new order at each visit; below 0, of the strata of a step."""
    key = (seed, visit) if visit >= 0 else (seed, -visit, 1)
    return np.random.default_rng(key).permutation(count)
