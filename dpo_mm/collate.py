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
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class PairStream(Dataset[dict[str, Any]]):
    """Rows visited again and again, in a new order each time, a pure function of the seed (and batch size, in groups).

    draws: K, the visit that a row's draw is made from runs 0..K-1 and again; 0: every visit is fresh.
    batch_size: rows of a process and step, which are of one group; length and what is asked for come in whole batches.
    """

    def __init__(
        self,
        rows: Sequence[Any] | Any,
        *,
        seed: int,
        length: int,
        draws: int = 0,
        shuffle: bool = True,
        batch_size: int = 1,
    ) -> None:
        self.rows, self.seed, self.length, self.draws, self.shuffle = rows, seed, length, draws, shuffle
        self.batch_size, self.groups = batch_size, groups_of(rows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        visit, row = self._plain(number) if len(self.groups) == 1 else self._grouped(number)
        return {**self.rows[row], "visit": visit % self.draws if self.draws else visit}

    def _plain(self, number: int) -> tuple[int, int]:
        visit, place = divmod(number, len(self.rows))
        return visit, int(_order(self.seed, visit, len(self.rows))[place]) if self.shuffle else place

    def _grouped(self, number: int) -> tuple[int, int]:
        step, place = divmod(number, self.batch_size)
        sizes = tuple(len(group) for group in self.groups)
        which, batch = _batch(self.seed, sizes, self.batch_size, step) if self.shuffle else self._in_turn(step)
        visit, at = divmod(batch * self.batch_size + place, sizes[which])
        order = _order((self.seed, which), visit, sizes[which]) if self.shuffle else range(sizes[which])
        return visit, self.groups[which][int(order[at])]

    def _in_turn(self, step: int) -> tuple[int, int]:
        """Batches of the first group, then of the next, each group's visits rounded up to whole batches."""
        for which, count in enumerate(whole_batches(self.groups, self.batch_size, self.draws or 1)):
            if step < count:
                return which, step
            step -= count
        raise IndexError(step)


def groups_of(rows: Any) -> Sequence[range]:
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
    return [filled[place] for place in _order((seed, len(sizes)), number, len(filled))]


@functools.lru_cache(maxsize=256)
def _order(seed: int | tuple[int, int], visit: int, count: int) -> np.ndarray:
    return np.random.default_rng((*(seed if isinstance(seed, tuple) else (seed,)), visit)).permutation(count)
