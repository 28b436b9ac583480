"""Is the tuned model better than the base? Paired statistics over the same prompts and seeds.

The prompt is the unit that is drawn at random, its seeds are repeats of it: so the interval resamples whole prompts
(clusters), and a prompt has one vote in the sign test however many seeds it has.

Departure from the plain percentile bootstrap: it is too narrow for few clusters, so its arms are stretched by
t(k-1) / z * sqrt(k / (k-1)), which is 1 for many clusters, in the spirit of Hesterberg 2015 (1411.5279) section 5.3,
who widens the quantiles instead (that can't reach past the data, which two or three clusters need).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Direction = Literal["higher", "lower", "neutral"]
Verdict = Literal["better", "no evidence", "worse", "differs"]
Overall = Literal["better", "no evidence", "worse", "differs", "over-optimised"]

BASE_AND_TUNED: tuple[str, str] = ("base", "tuned")
LEVEL = 0.05  # two-sided, everywhere
FEWEST_VOTES = 6  # five coins fall alike one time in sixteen: below six, no vote is evidence
DETECTABLE = 2.8  # standard errors: 1.96 for the level, 0.84 for 80 % power


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on one metric.

    base, tuned: means over items. difference: tuned - base, low to high its 95 % interval. n: items.
    wins, ties, losses: prompts (clusters) where tuned is better, the same, worse; p: their exact sign test.
    p_holm: the same corrected for the judges (or categories) that stand beside it; None where it stands alone.
    detectable: the smallest true difference found with 80 % power here. built_training_pairs: this judge made the training pairs.
    models: the two that are compared, of "base", "tuned" and "sft"; the first is in `base`, the second in `tuned`.
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
        """Share of prompts where tuned is better, a tie counting half, [0, 1]."""
        return (self.wins + self.ties / 2) / self.clusters

    def as_dict(self) -> dict[str, Any]:
        """The fields in their order and the win rate, as plain Python values that JSON takes."""
        fields = {name: getattr(value, "item", lambda v=value: v)() for name, value in dataclasses.asdict(self).items()}
        return {**fields, "models": list(self.models), "win_rate": self.win_rate}


@dataclass(frozen=True)
class McNemar:
    """Items right under one model alone, and the exact two-sided p of that split."""

    only_base: int
    only_tuned: int
    p: float


@dataclass(frozen=True)
class _Clusters:
    """Sum of the differences and number of items of each cluster, both (clusters,)."""

    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def error(self) -> float:
        """Standard error of the mean over items, clusters drawn at random (a ratio estimator)."""
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
    """Compare scores of the same prompt and seed, with a 95 % interval that resamples whole clusters.

    base, tuned: finite scores or booleans, (items,). clusters: id of the prompt of each, (items,). resamples: > 0.
    direction: of a better score; neutral: "differs" where the interval leaves out 0. models: names of the two. weights: of the items in both means,
    (items,), > 0, equal within a cluster; None: all alike.
    The sign test respects the clusters: each has one vote, the sign of its mean difference; ties have none.
    Returns "better" or "worse" only where the interval leaves out 0. It never does so where fewer than six clusters
    differ at all, since then no sign test could either. Where all differences are equal, the bootstrap has no width;
    its place takes the share of clusters that may yet turn out opposite (Clopper-Pearson, none seen of so many).
    Raises ValueError for fewer than 2 clusters, unequal lengths, or scores that are not finite.
    Source: Cameron, Gelbach & Miller 2008 (cluster bootstrap); Hesterberg 2015 (1411.5279).
    """
    _check_direction(direction)
    before, after, groups = _checked(base, tuned, clusters, weights)
    means = [
        float(np.average(scores, weights=None if weights is None else np.asarray(weights)))
        for scores in (before, after)
    ]
    scale = max(np.abs(before).max(), np.abs(after).max())
    votes = _votes(groups, scale) * (-1 if direction == "lower" else 1)
    wins, losses = int((votes > 0).sum()), int((votes < 0).sum())
    low, high = _interval(groups, scale, seed, resamples)
    if wins + losses < FEWEST_VOTES:
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
        p=_sign_test(wins, losses),
        clusters=len(votes),
        detectable=DETECTABLE * groups.error,
        models=models,
    )


def paired_shares(
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
    """Compare rates that are a sum over a sum, such as CHAIR_i or character error rates, item by item.

    base, tuned: (items, 2), hits and what they are of; an item where either counts nothing leaves the votes, not the
    sums. The interval resamples items, with both models' parts of each. direction, models: as in `paired`.
    Never so where fewer than six items differ, as in `paired`. Raises ValueError for other shapes, numbers that are
    not finite, or fewer than 2 items; a rate of nothing at all is 0. Source: as `paired`, for a ratio of sums.
    """
    _check_direction(direction)
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 2 or before.shape[1] != 2 or len(before) < 2:
        raise ValueError(f"base is {before.shape}, tuned {after.shape}: expected (items, 2) in both, 2 items or more")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError(f"{metric}: a share is not finite; leave that item out of both, and say so")
    each = np.column_stack([before, after])
    centre = float(_difference(*each.T))
    both = each[(before[:, 1] > 0) & (after[:, 1] > 0)]
    votes = np.sign(both[:, 2] / both[:, 3] - both[:, 0] / both[:, 1]) * (-1 if direction == "lower" else 1)
    wins, losses = int((votes > 0).sum()), int((votes < 0).sum())
    low = high = centre
    error = 0.0
    if len(np.unique(each, axis=0)) > 1:
        found = stats.bootstrap(
            tuple(each.T),
            _difference,
            n_resamples=resamples,
            batch=max(1, 1_000_000 // len(each)),
            vectorized=True,
            paired=True,
            confidence_level=1 - LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
        error = float(found.standard_error)
    if wins + losses < FEWEST_VOTES:
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
        n=len(each),
        verdict=_verdict(low, high, direction),
        wins=wins,
        ties=len(each) - wins - losses,
        losses=losses,
        p=_sign_test(wins, losses),
        clusters=len(each),
        detectable=DETECTABLE * error,
        models=models,
    )


def _rate(hits: NDArray[np.float64], of: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    total = of.sum(axis)
    return hits.sum(axis) / np.where(total > 0, total, 1.0)


def _difference(
    hits: NDArray[np.float64],
    of: NDArray[np.float64],
    after: NDArray[np.float64],
    of_after: NDArray[np.float64],
    axis: int = -1,
) -> NDArray[np.float64]:
    return _rate(after, of_after, axis) - _rate(hits, of, axis)


def minimum_detectable_effect(base: ArrayLike, tuned: ArrayLike, clusters: Sequence[Any] | NDArray[Any]) -> float:
    """The smallest true difference found with 80 % power at this number of clusters, in the metric's unit.

    base, tuned: scores, (items,). clusters: ids, (items,). Returns 2.8 clustered standard errors, >= 0; 0 where all
    differences are equal, which says that the spread was not seen, not that there is none.
    Raises ValueError as `paired` does.
    """
    *_, groups = _checked(base, tuned, clusters)
    return DETECTABLE * groups.error


def rate_interval(successes: int, n: int) -> tuple[float, float]:
    """Exact 95 % interval of a rate. successes of n trials, n > 0; returns (low, high), fractions.

    Raises ValueError unless 0 <= successes <= n. Source: Clopper & Pearson 1934.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n >= 1")
    interval = stats.binomtest(successes, n).proportion_ci(1 - LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def mcnemar(base: ArrayLike, tuned: ArrayLike) -> McNemar:
    """Exact paired test of two models on the same items. base, tuned: right or not, (items,), bool.

    It takes items as independent: with several seeds a prompt, use `paired`. p is 1 where no item tells them apart.
    Raises ValueError for unequal lengths. Source: McNemar 1947, exact binomial form.
    """
    before, after = np.asarray(base, dtype=bool), np.asarray(tuned, dtype=bool)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            f"base is {before.shape}, tuned {after.shape}: expected one verdict an item, (items,), in both"
        )
    only_base, only_tuned = int((before & ~after).sum()), int((after & ~before).sum())
    return McNemar(only_base, only_tuned, _sign_test(only_tuned, only_base))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for how many there are, (tests,), in the order given; reject where <= the level.

    Raises ValueError outside [0, 1]. Source: Holm 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must be one list of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def holm_corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, each sign test's p corrected by Holm for how many stand here side by side."""
    adjusted = holm([one.p for one in found])
    return [dataclasses.replace(one, p_holm=float(p)) for one, p in zip(found, adjusted, strict=True)]


def confirmed_verdict(one: Comparison) -> Verdict:
    """The verdict of the interval where the sign test gives it too: votes lean that way, p <= 0.05; else "no evidence".

    Of a few dozen clusters the interval alone is wrong more than once in twenty where nothing has changed, since its
    95 % hold for many; the sign test is exact for any number (`python -m tests.bench.compare_alarms`).
    """
    leans = {"better": one.wins > one.losses, "worse": one.losses > one.wins}.get(one.verdict, True)
    return one.verdict if leans and one.p <= LEVEL else "no evidence"


def run_verdict(headline: Comparison, guards: Sequence[Comparison]) -> Overall:
    """The verdict on a run: the headline's as it is `confirmed_verdict`, but "over-optimised" where it is better and any guard is worse.

    A guard is worse by its interval alone: a warning too many costs less than one too few.
    """
    word = confirmed_verdict(headline)
    return "over-optimised" if word == "better" and any(guard.verdict == "worse" for guard in guards) else word


def _checked(
    base: ArrayLike, tuned: ArrayLike, clusters: Sequence[Any] | NDArray[Any], weights: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], _Clusters]:
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    ids = np.asarray(clusters)
    if not before.shape == after.shape == ids.shape or before.ndim != 1:
        raise ValueError(
            f"base is {before.shape}, tuned {after.shape}, clusters {ids.shape}: expected one an item, (items,), in all"
        )
    for name, scores in (("base", before), ("tuned", after)):
        if not np.isfinite(scores).all():
            item = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"{name} score of item {item} is {scores[item]}: leave that item out of both, and say so")
    names, inverse = np.unique(ids, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} prompt(s): an interval over prompts needs 2 or more; compare on more prompts")
    share = np.ones(len(ids)) if weights is None else np.asarray(weights, dtype=np.float64)
    sums, sizes = np.bincount(inverse, weights=share * (after - before)), np.bincount(inverse, weights=share)
    return before, after, _Clusters(sums.astype(np.float64), sizes.astype(np.float64))


def _votes(groups: _Clusters, scale: float) -> NDArray[np.int64]:
    """Sign of each cluster's mean difference, (clusters,); what is within rounding of 0 is a tie, never a win."""
    means = groups.sums / groups.sizes
    return np.where(np.abs(means) <= 1e-12 * scale, 0, np.sign(means)).astype(np.int64)


def _interval(groups: _Clusters, scale: float, seed: int, resamples: int) -> tuple[float, float]:
    k, centre = len(groups.sums), groups.mean
    if groups.error <= 1e-12 * scale:
        arm = 2 * abs(centre) * rate_interval(0, k)[1]
        return centre - arm, centre + arm
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


def _sign_test(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
