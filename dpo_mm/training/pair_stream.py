"""The order of training, as data: index i of a `PairStream` is one visit of one row, whoever asks for it.

One epoch of the stream is the whole run, so resuming is skipping, and no state of a sampler needs keeping.

Rows of several sizes come in groups (`groups` of the set), and a batch holds one group's rows alone. Each group is
visited again and again in orders of its own and cut into batches; round v has the batches that came to be filled in its
groups' v-th visit, in an order of their own. So every row is seen equally often, none is left out, and an index still
says all: neither processes nor accumulation change what stands there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.protocol import Modality

EVAL_DRAWS = 4
"""Frozen (noise, timestep) draws of each watched row, one from each quarter of the schedule."""


@dataclass(frozen=True)
class PairStream(Dataset[dict[str, Any]]):
    """Rows visited again and again, in a new order each time, a pure function of the seed (and batch size, in groups)."""

    rows: Any
    """Encoded pairs, by number."""
    seed: int
    length: int
    num_fixed_draws: int = 0
    """K, the visit that a row's draw is made from runs 0..K-1 and again; 0: every visit is fresh."""
    num_strata: int = 0
    """So many rows in a row, a step's, draw their timesteps from as many parts of the schedule, one each; of K fixed
    draws, those of a row do so instead. 0: each is drawn by itself."""
    antithetic: bool = False
    """Each visit comes twice in a row, the second time with its noise negated."""
    shuffle: bool = True
    batch_size: int = 1
    """Rows of a process and step, which are of one group; length and what is asked for come in whole batches."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        number, second = divmod(number, 2) if self.antithetic else (number, 0)
        round_, row = self._ungrouped(number) if len(buckets_of(self.rows)) == 1 else self._in_bucket(number)
        visit = round_ % self.num_fixed_draws if self.num_fixed_draws else round_
        found = self.row_at_epoch(row, visit, number=number, sign=-1 if second else 1)
        if not self.shuffle:  # evaluation: rows that only fill up a batch count for nothing
            found["number"] = number if round_ < self.num_fixed_draws else -1
        return found

    def row_at_epoch(self, row: int, visit: int, *, number: int = 0, sign: int = 1) -> dict[str, Any]:
        """A row at one of its visits. number: its place in the stream, which strata go by unless draws are fixed."""
        found = self.rows[row]
        place_in_time = {"stratum": self._stratum(found["id"], visit, number)} if self.num_strata else {}
        return {**found, "visit": visit, "sign": sign, **place_in_time}

    def _ungrouped(self, number: int) -> tuple[int, int]:
        visit, place = divmod(number, len(self.rows))
        return visit, int(_order((self.seed, visit), len(self.rows))[place]) if self.shuffle else place

    def _in_bucket(self, number: int) -> tuple[int, int]:
        size, groups = max(self.batch_size // 2, 1) if self.antithetic else self.batch_size, buckets_of(self.rows)
        step, place = divmod(number, size)
        sizes = tuple(len(group) for group in groups)
        which, batch = _batch(self.seed, sizes, size, step) if self.shuffle else self._bucket_by_bucket(step)
        visit, at = divmod(batch * size + place, sizes[which])
        order = _order((self.seed, which, visit), sizes[which]) if self.shuffle else range(sizes[which])
        return visit, groups[which][int(order[at])]

    def _bucket_by_bucket(self, step: int) -> tuple[int, int]:
        """Batches of the first group, then of the next, each group's visits rounded up to whole batches."""
        for which, count in enumerate(whole_batches(buckets_of(self.rows), self.batch_size, self.num_fixed_draws or 1)):
            if step < count:
                return which, step
            step -= count
        raise IndexError(step)

    def _stratum(self, row: str, visit: int, number: int) -> tuple[int, int]:
        """Which part of the schedule, of how many."""
        if self.num_fixed_draws:
            return int(random_draws.stratum_order(self.seed, row, self.num_fixed_draws)[visit]), self.num_fixed_draws
        count = max(self.num_strata // 2, 1) if self.antithetic else self.num_strata
        step, place = divmod(number, count)
        return int(_order((self.seed, 1 + step, 1), count)[place]), count


def buckets_of(rows: Any) -> Sequence[range]:
    """Row numbers of each group of a set, all of them one group where it says nothing of groups."""
    return getattr(rows, "groups", None) or [range(len(rows))]


def whole_batches(groups: Sequence[range], batch_size: int, visits: int) -> list[int]:
    """Batches that so many visits of each group's rows take, the last one filled up from the next visit."""
    return [-(-visits * len(group) // batch_size) for group in groups]


def _batch(seed: int, sizes: tuple[int, ...], batch_size: int, step: int) -> tuple[int, int]:
    """Which group batch `step` is of, and which of that group's batches it is.

    After v rounds a group of n rows has filled floor(v n / batch_size) batches.
    """
    filled = lambda rounds: sum(rounds * size // batch_size for size in sizes)
    rounds = step * batch_size // sum(sizes)
    while filled(rounds + 1) <= step:
        rounds += 1
    return _round(seed, sizes, batch_size, rounds)[step - filled(rounds)]


@functools.lru_cache(maxsize=4)
def _round(seed: int, sizes: tuple[int, ...], batch_size: int, number: int) -> list[tuple[int, int]]:
    filled = [
        (which, batch)
        for which, size in enumerate(sizes)
        for batch in range(number * size // batch_size, (number + 1) * size // batch_size)
    ]
    return [filled[place] for place in _order((seed, len(sizes), number), len(filled))]


@functools.lru_cache(maxsize=256)
def _order(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


def training_stream(config: TrainConfig, rows: Any, processes: int) -> PairStream:
    """The whole run's pairs in their order, for so many processes."""
    step = config.batch_size * config.accumulate * processes
    return PairStream(
        rows,
        seed=config.seed,
        length=config.steps * step,
        num_fixed_draws=config.fixed_draws_per_row,
        num_strata=step if config.stratified_timesteps else 0,
        antithetic=config.antithetic_noise,
        batch_size=config.batch_size,
    )


def eval_stream(rows: Any, config: TrainConfig, *, modality: Modality) -> PairStream:
    """Watched rows once, or of images at EVAL_DRAWS draws that no training visit uses."""
    draws, size, groups = 1 if modality == "text" else EVAL_DRAWS, config.batch_size, buckets_of(rows)
    length = draws * len(rows) if len(groups) == 1 else size * sum(whole_batches(groups, size, draws))
    return PairStream(
        rows, seed=0, length=length, num_fixed_draws=draws, num_strata=draws, shuffle=False, batch_size=size
    )
