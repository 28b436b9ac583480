"""The random draws of diffusion, as data: a pure function of (run seed, row id, visit), and of the place in the stream.

Chosen and rejected, policy and reference see the same draw by construction; a resumed run, or one on another number of
processes, sees the same draws; and a reference's errors for K fixed visits can be computed once and kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri


def row_generator(seed: int, row: str, visit: int, what: str) -> np.random.Generator:
    """The generator of one purpose ("noise", "timestep", "posterior", ...) at one visit of one row."""
    digest = hashlib.blake2b(f"{seed}\0{row}\0{visit}\0{what}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_noise(seed: int, row: str, visit: int, shape: tuple[int, ...], *, what: str = "noise") -> np.ndarray:
    """Standard normal noise of this shape, float32."""
    return row_generator(seed, row, visit, what).standard_normal(shape, dtype=np.float32)


def sample_noise_level(
    seed: int,
    row: str,
    visit: int,
    *,
    kind: str = "uniform",
    within: tuple[float, float] = (0.0, 1.0),
    stratum: tuple[int, int] = (0, 1),
) -> float:
    """A place in the noise schedule, in [low, high) of `within`; 0 is clean, 1 pure noise.

    kind: a name in LEVELS. stratum: (which, of how many) equally likely parts of the distribution to draw from.
    """
    which, count = stratum
    share = float(row_generator(seed, row, visit, "timestep").uniform())
    return min(TIMESTEP_DISTRIBUTIONS[kind]((which + share) / count, *within), math.nextafter(within[1], within[0]))


def _uniform(share: float, low: float, high: float) -> float:
    return low + (high - low) * share


def _logit_normal(share: float, low: float, high: float) -> float:
    """sigmoid(n), n standard normal: the middle of the schedule more often. Source: Esser et al. 2024 (2403.03206)."""
    first, last = (float(ndtr(logit(end))) for end in (low, high))
    return float(expit(ndtri(first + (last - first) * share)))


TIMESTEP_DISTRIBUTIONS: dict[str, Callable[[float, float, float], float]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
}
"""The place below which a share in [0, 1] of a distribution lies, cut to [low, high]."""


def stratum_order(seed: int, key: str, count: int) -> np.ndarray:
    """An order of `count` strata, (count,): each is drawn from once."""
    return row_generator(seed, key, 0, "strata").permutation(count)
