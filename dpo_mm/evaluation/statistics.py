"""Paired statistics over the same prompts and seeds: is the tuned model better than the base?

Prompts are the random sample and the seeds of a prompt are repeats of it. So the interval resamples whole prompts
(clusters), and each prompt has one vote in the sign test, however many seeds it has.

Departure from the plain percentile bootstrap: it is too narrow for few clusters. So the distance from the mean to
each end of the interval is multiplied by t(k-1) / z * sqrt(k / (k-1)), which is 1 for many clusters. This follows the
idea of Hesterberg 2015 (1411.5279), section 5.3. He widens the quantiles instead, but that cannot reach beyond the
data, which an interval over two or three clusters needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dpo_mm.evaluation.significance import LEVEL, holm, rate_interval, sign_test

Direction = Literal["higher", "lower", "neutral"]
Verdict = Literal["better", "no evidence", "worse", "differs"]
Overall = Literal["better", "no evidence", "worse", "differs", "over-optimised"]

BASE_AND_TUNED: tuple[str, str] = ("base", "tuned")
MIN_VOTES = 6  # five equal votes have p = 1/16; with fewer than six, no sign test can be significant
MDE_STANDARD_ERRORS = 2.8  # 1.96 for the level and 0.84 for 80 % power


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models on one metric, usually base and tuned.

    Args:
        metric, judge: name of the metric, and of its judge.
        headline: whether this is the primary metric.
        base, tuned: means over items.
        difference: tuned minus base.
        low, high: 95 % interval of the difference.
        n: number of items (images or responses).
        verdict: of the interval: better, worse, differs or no evidence.
        wins, ties, losses: number of prompts (clusters) on which tuned is better, equal and worse.
        p: exact two-sided sign test of wins against losses.
        clusters: number of prompts.
        p_holm: p corrected for the number of judges or categories that are tested together. None if there is only one.
        detectable: minimum detectable effect: the smallest true difference found with 80 % power. None if unknown.
        built_training_pairs: whether this judge also built the training pairs.
        models: the two models, of "base", "tuned" and "sft". The first is in `base`, the second in `tuned`.
    """

    metric: str
    judge: str
    headline: bool
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    n: int
    verdict: Verdict
    wins: int
    ties: int
    losses: int
    p: float
    clusters: int
    p_holm: float | None = None
    detectable: float | None = None
    built_training_pairs: bool = False
    models: tuple[str, str] = BASE_AND_TUNED

    @property
    def win_rate(self) -> float:
        """Fraction of prompts on which tuned is better, in [0, 1]. A tie counts half."""
        return (self.wins + self.ties / 2) / self.clusters

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in their order and the win rate, as plain Python values for JSON."""
        fields = {name: getattr(value, "item", lambda v=value: v)() for name, value in dataclasses.asdict(self).items()}
        return {**fields, "models": list(self.models), "win_rate": self.win_rate}


@dataclass(frozen=True)
class _Clusters:
    """Sum of the differences and number of items of each cluster, (clusters,) each."""

    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean difference over items."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def error(self) -> float:
        """Standard error of the mean over items if clusters are a random sample (a ratio estimator)."""
        k = len(self.sums)
        residuals = self.sums - self.mean * self.sizes
        return float(np.sqrt(k / (k - 1) * (residuals**2).sum()) / self.sizes.sum())


def paired(
    base: ArrayLike,
    tuned: ArrayLike,
    *,
    clusters: Sequence[Any] | NDArray[Any],
    metric: str,
    judge: str,
    headline: bool = False,
    direction: Direction = "higher",
    models: tuple[str, str] = BASE_AND_TUNED,
    weights: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 4000,
) -> Comparison:
    """Compare scores of the same prompts and seeds, with a 95 % interval that resamples whole clusters.

    The sign test respects the clusters: each has one vote, the sign of its mean difference. Ties do not vote.
    If all differences are equal, the bootstrap interval has no width. Then its width comes from the fraction of clusters
    that may still turn out opposite (Clopper-Pearson, 0 of k observed).

    Args:
        base, tuned: finite scores or booleans, (items,).
        clusters: id of each item's prompt, (items,).
        metric, judge: name of the metric, and of its judge.
        headline: whether this is the primary metric.
        direction: direction of a better score. With "neutral" the verdict is "differs" or "no evidence".
        models: names of the two models.
        weights: weight of each item in both means, (items,), > 0, equal within a cluster. None: equal weights.
        seed: seed of the bootstrap.
        resamples: bootstrap resamples, > 0.

    Returns:
        The comparison. Its verdict is "no evidence" if the interval contains 0, and also if fewer than six clusters
        differ, because then no sign test could be significant.

    Raises:
        ValueError: if there are fewer than 2 clusters, the lengths differ, a score is not finite, or the direction is
            unknown.

    Source: Cameron, Gelbach & Miller 2008 (cluster bootstrap); Hesterberg 2015 (1411.5279).
    """
    _check_direction(direction)
    before, after, groups = _checked_scores(base, tuned, clusters, weights)
    means = [
        float(np.average(scores, weights=None if weights is None else np.asarray(weights)))
        for scores in (before, after)
    ]
    scale = max(np.abs(before).max(), np.abs(after).max())
    votes = _votes(groups, scale) * (-1 if direction == "lower" else 1)
    wins, losses = int((votes > 0).sum()), int((votes < 0).sum())
    low, high = _interval(groups, scale, seed, resamples)
    if wins + losses < MIN_VOTES:
        low, high = min(low, 0.0), max(high, 0.0)
    if min(before.min(), after.min()) >= 0 and max(before.max(), after.max()) <= 1:
        low, high = max(low, -1.0), min(high, 1.0)
    return Comparison(
        metric=metric,
        judge=judge,
        headline=headline,
        base=means[0],
        tuned=means[1],
        difference=groups.mean,
        low=low,
        high=high,
        n=len(before),
        verdict=_verdict(low, high, direction),
        wins=wins,
        ties=len(votes) - wins - losses,
        losses=losses,
        p=sign_test(wins, losses),
        clusters=len(votes),
        detectable=MDE_STANDARD_ERRORS * groups.error,
        models=models,
    )


def paired_ratios(
    base: ArrayLike,
    tuned: ArrayLike,
    *,
    metric: str,
    judge: str,
    headline: bool = False,
    direction: Direction = "higher",
    models: tuple[str, str] = BASE_AND_TUNED,
    seed: int = 0,
    resamples: int = 4000,
) -> Comparison:
    """Compare rates that are a sum over a sum, such as CHAIR_i or character error rate, item by item.

    The interval resamples items, each with its counts under both models.

    Args:
        base, tuned: hits and totals of each item, (items, 2). A rate whose totals sum to 0 is 0.
        metric, judge: name of the metric, and of its judge.
        headline: whether this is the primary metric.
        direction, models, seed, resamples: as in `paired`.

    Returns:
        The comparison. An item with a total of 0 under either model does not vote, but it counts in the sums. The
        verdict is "no evidence" if the interval contains 0 or fewer than six items differ.

    Raises:
        ValueError: if the shapes are others, a number is not finite, there are fewer than 2 items, or the direction is
            unknown.

    Source: as `paired`, for a ratio of sums.
    """
    _check_direction(direction)
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 2 or before.shape[1] != 2 or len(before) < 2:
        raise ValueError(f"base is {before.shape}, tuned {after.shape}: expected (items, 2) in both, 2 items or more")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError(
            f"{metric}: a hit count or total is not finite. Drop that item from both models and report how many were dropped."
        )
    counts = np.column_stack([before, after])
    centre = float(_rate_difference(*counts.T))
    counted = counts[(before[:, 1] > 0) & (after[:, 1] > 0)]
    votes = np.sign(counted[:, 2] / counted[:, 3] - counted[:, 0] / counted[:, 1]) * (-1 if direction == "lower" else 1)
    wins, losses = int((votes > 0).sum()), int((votes < 0).sum())
    low = high = centre
    error = 0.0
    if len(np.unique(counts, axis=0)) > 1:
        bootstrap = stats.bootstrap(
            tuple(counts.T),
            _rate_difference,
            n_resamples=resamples,
            batch=max(1, 1_000_000 // len(counts)),
            vectorized=True,
            paired=True,
            confidence_level=1 - LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)
        error = float(bootstrap.standard_error)
    if wins + losses < MIN_VOTES:
        low, high = min(low, 0.0), max(high, 0.0)
    return Comparison(
        metric=metric,
        judge=judge,
        headline=headline,
        base=float(_rate(before[:, 0], before[:, 1])),
        tuned=float(_rate(after[:, 0], after[:, 1])),
        difference=centre,
        low=low,
        high=high,
        n=len(counts),
        verdict=_verdict(low, high, direction),
        wins=wins,
        ties=len(counts) - wins - losses,
        losses=losses,
        p=sign_test(wins, losses),
        clusters=len(counts),
        detectable=MDE_STANDARD_ERRORS * error,
        models=models,
    )


def _rate(hits: NDArray[np.float64], totals: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Return the sum of hits over the sum of totals, 0 if the totals sum to 0."""
    total = totals.sum(axis)
    return hits.sum(axis) / np.where(total > 0, total, 1.0)


def _rate_difference(
    hits_base: NDArray[np.float64],
    totals_base: NDArray[np.float64],
    hits_tuned: NDArray[np.float64],
    totals_tuned: NDArray[np.float64],
    axis: int = -1,
) -> NDArray[np.float64]:
    return _rate(hits_tuned, totals_tuned, axis) - _rate(hits_base, totals_base, axis)


def minimum_detectable_effect(base: ArrayLike, tuned: ArrayLike, clusters: Sequence[Any] | NDArray[Any]) -> float:
    """Return the smallest true difference that this many clusters would detect with 80 % power.

    Args:
        base, tuned: finite scores, (items,).
        clusters: id of each item's prompt, (items,).

    Returns:
        2.8 clustered standard errors in the metric's unit, >= 0. It is 0 if all differences are equal: then the spread
        was not observed, which does not mean that there is none.

    Raises:
        ValueError: as in `paired`.
    """
    *_, groups = _checked_scores(base, tuned, clusters)
    return MDE_STANDARD_ERRORS * groups.error


def holm_corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the same comparisons with `p_holm`: each sign test's p corrected for the number of comparisons."""
    adjusted = holm([comparison.p for comparison in comparisons])
    return [
        dataclasses.replace(comparison, p_holm=float(p)) for comparison, p in zip(comparisons, adjusted, strict=True)
    ]


def confirmed_verdict(comparison: Comparison) -> Verdict:
    """Return the interval's verdict if the sign test agrees (same direction, p <= 0.05), else "no evidence".

    With a few dozen clusters the interval alone reports a difference between equal models more often than 1 in 20,
    because its 95 % holds for many clusters. The sign test is exact for any number
    (`python -m tests.bench.compare_alarms`).
    """
    same_direction = {
        "better": comparison.wins > comparison.losses,
        "worse": comparison.losses > comparison.wins,
    }.get(comparison.verdict, True)
    return comparison.verdict if same_direction and comparison.p <= LEVEL else "no evidence"


def run_verdict(headline: Comparison, guards: Sequence[Comparison]) -> Overall:
    """Return the primary metric's verdict, or "over-optimised" if it is better and a guardrail is worse.

    The primary metric needs its sign test (`confirmed_verdict`). A guardrail metric is worse by its interval alone: a
    false warning costs less than a missed one.

    Args:
        headline: the primary metric.
        guards: the guardrail metrics.
    """
    primary = confirmed_verdict(headline)
    return "over-optimised" if primary == "better" and any(guard.verdict == "worse" for guard in guards) else primary


def _checked_scores(
    base: ArrayLike, tuned: ArrayLike, clusters: Sequence[Any] | NDArray[Any], weights: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], _Clusters]:
    """Return both models' scores as floats and the differences by cluster. Raise ValueError as `paired` does."""
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    ids = np.asarray(clusters)
    if not before.shape == after.shape == ids.shape or before.ndim != 1:
        raise ValueError(
            f"base is {before.shape}, tuned {after.shape}, clusters {ids.shape}: expected one value per item, (items,), "
            "in all three"
        )
    for name, scores in (("base", before), ("tuned", after)):
        if not np.isfinite(scores).all():
            item = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"{name} score of item {item} is {scores[item]}. "
                "Drop the item from both models and report how many were dropped."
            )
    names, inverse = np.unique(ids, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} prompt(s): an interval over prompts needs 2 or more. Compare on more prompts.")
    weight = np.ones(len(ids)) if weights is None else np.asarray(weights, dtype=np.float64)
    sums, sizes = np.bincount(inverse, weights=weight * (after - before)), np.bincount(inverse, weights=weight)
    return before, after, _Clusters(sums.astype(np.float64), sizes.astype(np.float64))


def _votes(groups: _Clusters, scale: float) -> NDArray[np.int64]:
    """Return the sign of each cluster's mean difference, (clusters,). A mean within rounding of 0 is a tie."""
    means = groups.sums / groups.sizes
    return np.where(np.abs(means) <= 1e-12 * scale, 0, np.sign(means)).astype(np.int64)


def _interval(groups: _Clusters, scale: float, seed: int, resamples: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference."""
    k, centre = len(groups.sums), groups.mean
    if groups.error <= 1e-12 * scale:
        half_width = 2 * abs(centre) * rate_interval(0, k)[1]
        return centre - half_width, centre + half_width
    result = stats.bootstrap(
        (groups.sums, groups.sizes),
        lambda sums, sizes, axis=-1: sums.sum(axis) / sizes.sum(axis),
        n_resamples=resamples,
        batch=max(1, 2_000_000 // k),
        vectorized=True,
        paired=True,
        confidence_level=1 - LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    stretch = stats.t.ppf(1 - LEVEL / 2, k - 1) / stats.norm.ppf(1 - LEVEL / 2) * np.sqrt(k / (k - 1))
    return float(centre - (centre - result.low) * stretch), float(centre + (result.high - centre) * stretch)


def _check_direction(direction: str) -> None:
    """Raise ValueError unless the direction is one of `Direction`."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction {direction!r} is unknown. Use one of {', '.join(get_args(Direction))}.")


def _verdict(low: float, high: float, direction: Direction) -> Verdict:
    if low <= 0 <= high:
        return "no evidence"
    if direction == "neutral":
        return "differs"
    return "better" if (low > 0) == (direction == "higher") else "worse"
