"""The order of training rows as a function: index i of a `PairStream` is one row in one epoch.

One epoch of the data loader is the whole run, so resuming is skipping, and no sampler state is saved.

Rows of several sizes come in buckets (`buckets` of the dataset), and a batch has rows of one bucket only. Each bucket is repeated
in new orders and cut into batches. Invariant: after v epochs, a bucket of n rows has filled floor(v * n / batch_size) batches.
Epoch v consists of the batches that are completed in it, in a shuffled order. So every row is used equally often, none is
dropped, and the order does not depend on processes or accumulation.

With lengths, each epoch is in transformers' order for `train_sampling_strategy: group_by_length`: rows of similar length follow
each other. It depends on seed, epoch, lengths and pairs per step, so that several processes make the batches of one.

Example: buckets of 3 and 2 rows, batch_size 2. Epoch 0 completes floor(3 / 2) = 1 and floor(2 / 2) = 1 batches. Epoch 1 completes
floor(6 / 2) - 1 = 2 and floor(4 / 2) - 1 = 1. After two epochs all 10 uses of rows are in 5 batches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.diffusion.row_variants import without_variants
from dpo_mm.policies.protocol import Modality

EVAL_DRAWS = 4
"""Fixed samples of noise and timestep per evaluation row, one from each quartile of the schedule."""


@dataclass(frozen=True)
class PairStream(Dataset[dict[str, Any]]):
    """Rows in a new order each epoch, as a pure function of the seed (and of the batch size, with buckets)."""

    rows: Any
    """Encoded pairs, by number."""
    seed: int
    length: int
    num_fixed_draws: int = 0
    """K: a row's noise repeats after K epochs. 0: fresh noise in every epoch."""
    num_strata: int = 0
    """Number of parts of the noise schedule. The rows of a step draw one timestep from each part. With K fixed draws, the
    draws of a row do so instead. 0: timesteps are independent."""
    antithetic: bool = False
    """Each use of a row is two items in succession, the second with negated noise."""
    shuffle: bool = True
    batch_size: int = 1
    """Rows per process and step, all from one bucket. The length is a multiple of it."""
    lengths: Sequence[int] | None = None
    """Tokens of each row, to put rows of similar length together."""
    pairs_per_step: int = 1
    """Rows that get similar lengths: those of a step, on all processes."""
    _orders: dict[int, Sequence[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        number, second = divmod(number, 2) if self.antithetic else (number, 0)
        round_, row = self._in_one_bucket(number) if len(buckets_of(self.rows)) == 1 else self._in_bucket(number)
        visit = round_ % self.num_fixed_draws if self.num_fixed_draws else round_
        item = self.row_at_epoch(row, visit, number=number, sign=-1 if second else 1)
        if not self.shuffle:  # evaluation: -1 marks rows that only fill the last batch and are not counted
            item["number"] = number if round_ < self.num_fixed_draws else -1
        return item

    def row_at_epoch(self, row: int, visit: int, *, number: int = 0, sign: int = 1) -> dict[str, Any]:
        """Return a row in one of its epochs (`visit`). number: its index in the stream, which selects the stratum."""
        encoded = self.rows[row]
        if not self.shuffle:  # evaluation
            encoded = without_variants(encoded)
        stratum = {"stratum": self._stratum(encoded["id"], visit, number)} if self.num_strata else {}
        return {**encoded, "visit": visit, "sign": sign, **stratum}

    def _in_one_bucket(self, number: int) -> tuple[int, int]:
        visit, position = divmod(number, len(self.rows))
        if self.lengths is not None:
            return visit, self._order_by_length(self.lengths, visit)[position]
        return visit, int(_order((self.seed, visit), len(self.rows))[position]) if self.shuffle else position

    def _order_by_length(self, lengths: Sequence[int], visit: int) -> Sequence[int]:
        if visit not in self._orders:
            self._orders.clear()
            self._orders[visit] = order_by_length(lengths, self.pairs_per_step, (self.seed, visit))
        return self._orders[visit]

    def _in_bucket(self, number: int) -> tuple[int, int]:
        size, buckets = max(self.batch_size // 2, 1) if self.antithetic else self.batch_size, buckets_of(self.rows)
        step, position = divmod(number, size)
        sizes = tuple(len(bucket) for bucket in buckets)
        which, batch = _batch(self.seed, sizes, size, step) if self.shuffle else self._bucket_by_bucket(step)
        visit, at = divmod(batch * size + position, sizes[which])
        order = _order((self.seed, which, visit), sizes[which]) if self.shuffle else range(sizes[which])
        return visit, buckets[which][int(order[at])]

    def _bucket_by_bucket(self, step: int) -> tuple[int, int]:
        """Return bucket and batch of a step: all batches of the first bucket, then of the next, each rounded up."""
        for which, count in enumerate(whole_batches(buckets_of(self.rows), self.batch_size, self.num_fixed_draws or 1)):
            if step < count:
                return which, step
            step -= count
        raise IndexError(step)

    def _stratum(self, row: str, visit: int, number: int) -> tuple[int, int]:
        """Return the part of the noise schedule, and the number of parts."""
        if self.num_fixed_draws:
            return int(random_draws.stratum_order(self.seed, row, self.num_fixed_draws)[visit]), self.num_fixed_draws
        count = max(self.num_strata // 2, 1) if self.antithetic else self.num_strata
        step, position = divmod(number, count)
        return int(_order((self.seed, 1 + step, 1), count)[position]), count


def buckets_of(rows: Any) -> Sequence[range]:
    """Row numbers of each bucket of a dataset. All rows are one bucket if the dataset has none."""
    return getattr(rows, "buckets", None) or [range(len(rows))]


def whole_batches(buckets: Sequence[range], batch_size: int, visits: int) -> list[int]:
    """Number of batches per bucket for a number of epochs. The last one is filled up from the next epoch."""
    return [-(-visits * len(bucket) // batch_size) for bucket in buckets]


def _batch(seed: int, sizes: tuple[int, ...], batch_size: int, step: int) -> tuple[int, int]:
    """Return the bucket of batch `step`, and the batch's number in its bucket.

    After v epochs, a bucket of n rows has filled floor(v * n / batch_size) batches.
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
    return [filled[position] for position in _order((seed, len(sizes), number), len(filled))]


@functools.lru_cache(maxsize=256)
def _order(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


def order_by_length(lengths: Sequence[int], batch_size: int, key: Sequence[int]) -> list[int]:
    """Return a random order of rows in which those of a batch have similar lengths. The first batch has the longest row.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch.
        key: numbers from which the random order is derived.

    Source: `transformers.trainer_pt_utils.get_length_grouped_indices`.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    seed = int(np.random.SeedSequence(tuple(key)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(seed)
    return get_length_grouped_indices(list(lengths), batch_size, generator=generator)


def lengths_of(rows: Any) -> Sequence[int]:
    """Return the tokens of each encoded response pair: prompt, images and the longer response."""
    lengths: Sequence[int] | None = getattr(rows, "lengths", None)
    return lengths or [
        len(row["prompt_ids"]) + max(len(row.get(f"{s}_ids", ())) for s in ("chosen", "rejected")) for row in rows
    ]


def training_stream(config: TrainConfig, rows: Any, processes: int) -> PairStream:
    """Make the stream of a whole run.

    Args:
        config: settings of the run.
        rows: encoded training pairs.
        processes: number of processes.
    """
    step = config.batch_size * config.accumulate * processes
    return PairStream(
        rows,
        seed=config.seed,
        length=config.steps * step,
        num_fixed_draws=config.fixed_draws_per_row,
        num_strata=step if config.stratified_timesteps else 0,
        antithetic=config.antithetic_noise,
        batch_size=config.batch_size,
        lengths=lengths_of(rows) if config.train_sampling_strategy == "group_by_length" else None,
        pairs_per_step=step,
    )


def eval_stream(rows: Any, config: TrainConfig, *, modality: Modality) -> PairStream:
    """Make the stream of evaluation rows: each once, or for images at EVAL_DRAWS noise samples that training never uses."""
    draws, size, buckets = 1 if modality == "text" else EVAL_DRAWS, config.batch_size, buckets_of(rows)
    length = draws * len(rows) if len(buckets) == 1 else size * sum(whole_batches(buckets, size, draws))
    return PairStream(
        rows, seed=0, length=length, num_fixed_draws=draws, num_strata=draws, shuffle=False, batch_size=size
    )
