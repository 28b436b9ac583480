"""Noise and noise levels as a pure function of run seed, row id, epoch and purpose.

Chosen and rejected, policy and reference therefore use the same noise. A resumed run, or one on another number of
processes, uses the same noise too. The reference's errors for K fixed epochs can be computed once and cached.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri


def row_generator(seed: int, row: str, epoch: int, purpose: str) -> np.random.Generator:
    """Return the random generator of one purpose at one epoch of one row.

    Args:
        seed: seed of the run.
        row: id of the row.
        epoch: epoch of the row, from 0.
        purpose: the purpose, such as "noise", "timestep" or "posterior".
    """
    digest = hashlib.blake2b(f"{seed}\0{row}\0{epoch}\0{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_noise(seed: int, row: str, epoch: int, shape: tuple[int, ...], *, purpose: str = "noise") -> np.ndarray:
    """Sample standard normal noise in this shape, float32. See `row_generator` for the other arguments."""
    return row_generator(seed, row, epoch, purpose).standard_normal(shape, dtype=np.float32)


def sample_noise_level(
    seed: int,
    row: str,
    epoch: int,
    *,
    distribution: str = "uniform",
    level_range: tuple[float, float] = (0.0, 1.0),
    stratum: tuple[int, int] = (0, 1),
) -> float:
    """Sample a noise level. 0 is clean and 1 is pure noise.

    Args:
        seed: seed of the run.
        row: id of the row.
        epoch: epoch of the row, from 0.
        distribution: a name in TIMESTEP_DISTRIBUTIONS.
        level_range: low and high, 0 <= low < high <= 1.
        stratum: (index, count): sample from this one of `count` equally likely parts of the distribution.

    Returns:
        A level in [low, high).
    """
    index, count = stratum
    u = float(row_generator(seed, row, epoch, "timestep").uniform())
    level = TIMESTEP_DISTRIBUTIONS[distribution]((index + u) / count, *level_range)
    return min(level, math.nextafter(level_range[1], level_range[0]))


def _uniform(u: float, low: float, high: float) -> float:
    return low + (high - low) * u


def _logit_normal(u: float, low: float, high: float) -> float:
    """sigmoid(n) with n standard normal, which prefers the middle of the schedule: Esser et al. 2024 (2403.03206)."""
    first, last = (float(ndtr(logit(end))) for end in (low, high))
    return float(expit(ndtri(first + (last - first) * u)))


TIMESTEP_DISTRIBUTIONS: dict[str, Callable[[float, float, float], float]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
}
"""Inverse CDF of each distribution: it maps u in [0, 1] to a noise level in [low, high]."""


def stratum_order(seed: int, key: str, count: int) -> np.ndarray:
    """Return a random order of the stratum indices 0 to count - 1, (count,), each index once.

    Args:
        seed: seed of the run.
        key: id of the row or name of the step.
        count: number of strata.
    """
    return row_generator(seed, key, 0, "strata").permutation(count)
