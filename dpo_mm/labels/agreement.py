"""Agreement of annotators with themselves and with each other: counts, and Krippendorff's alpha.

Alpha is 1 if people always choose the same, and 0 if they agree as often as chance has it. It takes pairs with any number
of votes, and chance into account: two people who always choose "tie" agree, and say nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dpo_mm.labels.store import Vote
from dpo_mm.printing.printed_text import counted

REPLICATES = 2000
MIN_DOUBLE_PAIRS = 10
"""Smallest number of pairs with votes of two people for which alpha is reported. An interval from fewer means little."""


@dataclass(frozen=True)
class Agreement:
    """Number of equal choices: of one person on a pair and its repeat, and of two people on the same pair.

    Args:
        same_annotator: number of repeats with the same choice, of repeats.
        repeats: number of repeats.
        two_annotators: number of comparisons with the same choice, of comparisons.
        comparisons: number of pairs of people who voted on the same pair, summed over the pairs.
    """

    same_annotator: int
    repeats: int
    two_annotators: int
    comparisons: int


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha with its 95 % interval (low, high), from a number of pairs. Not defined if value is None."""

    value: float | None
    low: float
    high: float
    pairs: int

    def text(self) -> str:
        """Return alpha with its interval, or why there is none."""
        pairs = f"{counted(self.pairs, 'pair')} with votes of two or more people"
        if self.pairs < MIN_DOUBLE_PAIRS:
            return f"too few double votes: {pairs}, and {MIN_DOUBLE_PAIRS} are needed"
        if self.value is None:
            return f"not defined: everybody chose the same on all of {pairs}"
        return f"{self.value:z.2f} (95 % interval {self.low:z.2f} to {self.high:z.2f}), from {pairs}"


def agreement(votes: Sequence[Vote]) -> Agreement:
    """Count how often annotators agree with themselves and with each other. Skips are ignored."""
    choices = {(vote.annotator, vote.pair, vote.is_repeat): vote.choice for vote in votes if vote.choice != "skip"}
    same_annotator = [
        choices[annotator, pair, False] == choice
        for (annotator, pair, is_repeat), choice in choices.items()
        if is_repeat and (annotator, pair, False) in choices
    ]
    two_annotators = [
        first == second for pair_choices in _choices(votes).values() for first, second in combinations(pair_choices, 2)
    ]
    return Agreement(sum(same_annotator), len(same_annotator), sum(two_annotators), len(two_annotators))


def _choices(votes: Sequence[Vote]) -> dict[str, list[str]]:
    """Return the choices on each pair, without repeats and skips."""
    by_pair: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        if not vote.is_repeat and vote.choice != "skip":
            by_pair[vote.pair].append(vote.choice)
    return by_pair


def krippendorff_alpha(votes: Sequence[Vote], *, seed: int = 0) -> Alpha:
    """Measure the agreement of people on the choice (a, b, tie or both_bad). Skips and repeats are ignored.

    The interval is a percentile bootstrap over pairs, because the votes on one pair are not independent.

    Args:
        votes: active votes.
        seed: seed of the bootstrap.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C (nominal data, missing values).
    """
    double = [Counter(choices) for choices in _choices(votes).values() if len(choices) > 1]
    undefined = Alpha(None, float("nan"), float("nan"), len(double))
    if not double:
        return undefined
    names = sorted({choice for counts in double for choice in counts})
    rows = np.array([[counts[name] for name in names] for counts in double], dtype=float)
    table, frequency = np.unique(rows, axis=0, return_counts=True)  # equal pairs are drawn together
    value = float(alphas(table, frequency[None].astype(float))[0])
    if np.isnan(value):
        return undefined
    weights = np.random.default_rng(seed).multinomial(len(rows), frequency / len(rows), REPLICATES)
    low, high = np.nanquantile(alphas(table, weights.astype(float)), (0.025, 0.975))
    return Alpha(value, float(low), float(high), len(double))


def alphas(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute alpha of weighted units, (replicates,). It is NaN if all choices are the same.

    alpha = 1 - (n - 1) (n - sum_c o_cc) / (n^2 - sum_c n_c^2), with o_cc the coincidences of a choice with itself, n_c its
    number, and n the sum of the n_c.

    Args:
        table: number of people per choice, (units, choices), at least two people per unit.
        weights: number of times each unit counts, (replicates, units).
    """
    people = table.sum(1)
    coincidences = (table * (table - 1)).sum(1) / (people - 1)
    numbers, total = weights @ table, weights @ people
    expected = total**2 - (numbers**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (total - 1) * (total - weights @ coincidences) / expected, np.nan)
