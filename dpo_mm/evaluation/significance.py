"""Exact tests and intervals: sign test, McNemar, Clopper-Pearson, and Holm's correction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.05
"""Significance level of every test and interval, two-sided."""


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's exact test.

    Args:
        only_base, only_tuned: number of items that only this model gets right.
        p: exact two-sided p of that split.
    """

    only_base: int
    only_tuned: int
    p: float


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p of the sign test, 1 if there are neither wins nor losses."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def rate_interval(successes: int, n: int) -> tuple[float, float]:
    """Compute the exact 95 % interval of a rate.

    Args:
        successes: number of successes, in [0, n].
        n: number of trials, >= 1.

    Returns:
        Low and high end, fractions.

    Raises:
        ValueError: unless 0 <= successes <= n and n >= 1.

    Source: Clopper & Pearson 1934.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n >= 1")
    interval = stats.binomtest(successes, n).proportion_ci(1 - LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def mcnemar(base: ArrayLike, tuned: ArrayLike) -> McNemar:
    """Test exactly whether two models differ in the items they get right.

    The test treats items as independent. With several seeds per prompt, use `paired`.

    Args:
        base, tuned: whether each item is right, (items,), bool.

    Returns:
        Counts and p. p is 1 if no item distinguishes the models.

    Raises:
        ValueError: if the lengths differ.

    Source: McNemar 1947, exact binomial form.
    """
    before, after = np.asarray(base, dtype=bool), np.asarray(tuned, dtype=bool)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"base is {before.shape}, tuned {after.shape}: expected one value per item, (items,), in both")
    only_base, only_tuned = int((before & ~after).sum()), int((after & ~before).sum())
    return McNemar(only_base, only_tuned, sign_test(only_tuned, only_base))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Correct p-values for their number.

    Args:
        p_values: p-values in [0, 1], (tests,).

    Returns:
        Corrected p-values in the same order, (tests,). A test is significant if its value is at most the level.

    Raises:
        ValueError: if a value is outside [0, 1].

    Source: Holm 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must be one list of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
