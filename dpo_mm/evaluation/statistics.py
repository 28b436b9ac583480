"""Paired statistics over the same prompts and seeds: is the tuned model better than the base?

Prompts are the random sample and the seeds of a prompt are repeats of it. So the interval is over whole prompts
(clusters), and each prompt has one vote in the sign test, however many seeds it has.

The interval is the mean difference plus and minus t(k-1) clustered standard errors of k clusters (Cameron & Miller 2015,
section VI.A). Its coverage is measured by `python -m tests.bench.coverage`. With fewer than five items that differ, no
method covers 95 %, so there is no interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dpo_mm.evaluation.clusters import checked_scores, sign_votes, standard_error
from dpo_mm.evaluation.significance import LEVEL, holm, rate_interval, sign_test
from dpo_mm.printing.notebook_html import table_with_head

Direction = Literal["higher", "lower", "neutral"]
Verdict = Literal["better", "no evidence", "worse", "differs"]

BASE_AND_TUNED: tuple[str, str] = ("base", "tuned")
MIN_EVENTS = 5
"""Items that must differ between the models for an interval."""
MIN_YES_NO_ITEMS, MIN_YES_NO_CLUSTERS = 16, 12
"""Yes-or-no items, and clusters of them, for an interval. With fewer, those that have one contain the true difference
less often than 93 % (`python -m tests.bench.coverage`)."""
POWER = 0.8
"""Power at the minimum detectable effect."""


SHOWN_COLUMNS = ("metric", "models", "first", "second", "difference", "95 % interval", "p of the sign test", "verdict")
"""Columns of a comparison in a notebook."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models on one metric, usually base and tuned.

    Args:
        metric: name of the metric.
        judge: name of its judge.
        headline: whether this is the primary metric.
        base: mean over items of the first model.
        tuned: mean over items of the second model.
        difference: tuned minus base.
        low: lower end of the 95 % interval of the difference. None if too few items differ.
        high: upper end of this interval. None if too few items differ.
        n: number of items (images or responses).
        verdict: better, worse, differs or no evidence, see `verdict_of`.
        wins: number of prompts (clusters) on which tuned is better.
        ties: number of prompts on which both are equal.
        losses: number of prompts on which tuned is worse.
        p: exact two-sided sign test of wins against losses.
        clusters: number of prompts.
        p_holm: p corrected for the number of rows that are tested together. None if there is only one.
        detectable: minimum detectable effect: the smallest true difference whose interval excludes 0 with 80 % power.
        built_training_pairs: whether this judge also built the training pairs.
        models: the two models, of "base", "tuned" and "sft". The first is in `base`, the second in `tuned`.
        direction: direction of a better score.
        side_set: name of the side set whose items are compared, "" for the prompts or questions of the comparison itself.
    """

    metric: str
    judge: str
    headline: bool
    base: float
    tuned: float
    difference: float
    low: float | None
    high: float | None
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
    direction: Direction = "higher"
    side_set: str = ""

    @property
    def name(self) -> str:
        """Name of the metric, with that of its side set."""
        return f"{self.metric} on {self.side_set}" if self.side_set else self.metric

    @property
    def win_rate(self) -> float:
        """Fraction of prompts on which tuned is better, in [0, 1]. A tie counts half."""
        return (self.wins + self.ties / 2) / self.clusters

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in their order and the win rate, as plain Python values for JSON."""
        fields = {name: getattr(value, "item", lambda v=value: v)() for name, value in dataclasses.asdict(self).items()}
        return {**fields, "models": list(self.models), "win_rate": self.win_rate}

    def __repr__(self) -> str:
        return f"Comparison({self.name!r}, {self.difference:+.4g}, {self._interval}, {self.verdict!r})"

    def _repr_html_(self) -> str:
        return table_with_head(self.name, SHOWN_COLUMNS, [self.cells()])

    @property
    def _interval(self) -> str:
        return "no interval" if self.low is None or self.high is None else f"[{self.low:+.4g}, {self.high:+.4g}]"

    def cells(self) -> list[str]:
        """Return the values of SHOWN_COLUMNS as text."""
        numbers = f"{self.base:.4g}", f"{self.tuned:.4g}", f"{self.difference:+.4g}"
        return [self.name, " and ".join(self.models), *numbers, self._interval, f"{self.p:.2g}", self.verdict]


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
) -> Comparison:
    """Compare scores of the same prompts and seeds, with a 95 % interval over clusters.

    The sign test respects the clusters: each has one vote, the sign of its mean difference. Ties do not vote.
    If all differences are equal, the standard error is 0. Then the interval's width comes from the fraction of clusters
    that may still turn out opposite (Clopper-Pearson, 0 of k observed).

    Args:
        base, tuned: finite scores or booleans, (items,).
        clusters: id of each item's prompt, (items,).
        metric: name of the metric.
        judge: name of its judge.
        headline: whether this is the primary metric.
        direction: direction of a better score. With "neutral" the verdict is "differs" or "no evidence".
        models: names of the two models.
        weights: weight of each item in both means, (items,), > 0, equal within a cluster. None: equal weights.

    Returns:
        The comparison. It has no interval if fewer than five items differ, or if all scores are 0 or 1 and there are
        fewer than 16 items or 12 clusters. Its verdict is that of `verdict_of`.

    Raises:
        ValueError: if there are fewer than 2 clusters, the lengths differ, a score is not finite, or the direction is
            unknown.

    Source: Cameron & Miller 2015, A practitioner's guide to cluster-robust inference, Journal of Human Resources 50.
    """
    _check_direction(direction)
    before, after, groups = checked_scores(base, tuned, clusters, weights)
    means = [
        float(np.average(scores, weights=None if weights is None else np.asarray(weights)))
        for scores in (before, after)
    ]
    scale = max(np.abs(before).max(), np.abs(after).max())
    votes = sign_votes(groups, scale) * (-1 if direction == "lower" else 1)
    events = int((np.abs(after - before) > 1e-12 * scale).sum())
    low, high = _interval(groups.mean, groups.influence, scale, enough=_enough(events, len(votes), before, after))
    in_unit_range = min(before.min(), after.min()) >= 0 and max(before.max(), after.max()) <= 1
    if in_unit_range and low is not None and high is not None:
        low, high = max(low, -1.0), min(high, 1.0)
    return _comparison(
        votes=votes,
        error=groups.error,
        metric=metric,
        judge=judge,
        headline=headline,
        base=means[0],
        tuned=means[1],
        difference=groups.mean,
        low=low,
        high=high,
        n=len(before),
        direction=direction,
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
    clusters: Sequence[Any] | NDArray[Any] | None = None,
) -> Comparison:
    """Compare rates that are a sum over a sum, such as CHAIR_i or character error rate, cluster by cluster.

    The interval takes clusters as a random sample, each with the summed counts of its items under both models.

    Args:
        base, tuned: hits and totals of each item, (items, 2). A rate whose totals sum to 0 is 0.
        metric: name of the metric.
        judge: name of its judge.
        headline: whether this is the primary metric.
        direction, models: as in `paired`.
        clusters: id of each item's image, (items,). None: each item is a cluster.

    Returns:
        The comparison. Each cluster has one vote: the sign of the difference of its rates. With a total of 0, no hits
        are a rate of 0, and hits are worse the more there are (characters on a blank page). Interval and verdict are
        as in `paired`.

    Raises:
        ValueError: if the shapes are others, a number is not finite, there are fewer than 2 clusters, or the direction
            is unknown.

    Source: as `paired`, with the influence of an item on a ratio of sums.
    """
    _check_direction(direction)
    items = _checked_counts(base, tuned, metric)
    before, after = (_sums_of_clusters(counts, clusters) for counts in items)
    if len(before) < 2:
        raise ValueError(
            f"{metric}: {len(before)} cluster(s), and an interval needs 2. Compare on more prompts or images"
        )
    rates = _pooled_rate(before), _pooled_rate(after)
    gain = np.sign(_item_rates(after) - _item_rates(before)).astype(np.int64)
    influence = _rate_influence(after, rates[1]) - _rate_influence(before, rates[0])
    item_rates = [_item_rates(counts) for counts in items]
    enough = _enough(int((item_rates[0] != item_rates[1]).sum()), len(gain), *item_rates)
    low, high = _interval(rates[1] - rates[0], influence, max(map(abs, rates)), enough=enough)
    return _comparison(
        votes=-gain if direction == "lower" else gain,
        error=standard_error(influence),
        metric=metric,
        judge=judge,
        headline=headline,
        base=rates[0],
        tuned=rates[1],
        difference=rates[1] - rates[0],
        low=low,
        high=high,
        n=len(items[0]),
        direction=direction,
        models=models,
    )


def _checked_counts(base: ArrayLike, tuned: ArrayLike, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the hits and totals of both models as floats, (items, 2) each. Raise ValueError as `paired_ratios` does."""
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 2 or before.shape[1] != 2 or len(before) < 2:
        raise ValueError(f"base is {before.shape}, tuned {after.shape}: expected (items, 2) in both, 2 items or more")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError(
            f"{metric}: a hit count or total is not finite. Drop that item from both models and report how many were dropped."
        )
    return before, after


def _sums_of_clusters(
    counts: NDArray[np.float64], clusters: Sequence[Any] | NDArray[Any] | None
) -> NDArray[np.float64]:
    """Return the summed hits and totals of each cluster, (clusters, 2)."""
    if clusters is None:
        return counts
    numbers = np.unique(np.asarray(clusters), return_inverse=True)[1]
    return np.stack([np.bincount(numbers, weights=column) for column in counts.T], axis=1)


def _comparison(*, votes: NDArray[np.int64], error: float, **fields: Any) -> Comparison:
    """Build a comparison with its verdict. votes: 1 for tuned, -1 for base, 0 for a tie."""
    wins, losses = int((votes > 0).sum()), int((votes < 0).sum())
    result = Comparison(
        **fields,
        verdict="no evidence",
        wins=wins,
        ties=len(votes) - wins - losses,
        losses=losses,
        p=sign_test(wins, losses),
        clusters=len(votes),
        detectable=_detectable(error, len(votes)),
    )
    return dataclasses.replace(result, verdict=verdict_of(result))


def _pooled_rate(counts: NDArray[np.float64]) -> float:
    """Return the sum of hits over the sum of totals, or the sum of hits if the totals sum to 0."""
    hits, total = counts.sum(0)
    return float(hits / (total or 1.0))


def _rate_influence(counts: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Return the influence of each item on the pooled rate, with mean 0, (items,)."""
    influence = (counts[:, 0] - rate * counts[:, 1]) * len(counts) / (counts[:, 1].sum() or 1.0)
    return influence - influence.mean()


def _item_rates(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rate of each item, (items,). Hits without a total are above any rate, and above fewer such hits."""
    return counts[:, 0] / np.where(counts[:, 1] > 0, counts[:, 1], 1e-9)


def _enough(events: int, clusters: int, *scores: NDArray[np.float64]) -> bool:
    """Return whether there are enough items that differ (events) for an interval. scores: (items,) of each model."""
    yes_or_no = all(np.isin(values, (0, 1)).all() for values in scores)
    many = len(scores[0]) >= MIN_YES_NO_ITEMS and clusters >= MIN_YES_NO_CLUSTERS
    return events >= MIN_EVENTS and (many or not yes_or_no)


def minimum_detectable_effect(base: ArrayLike, tuned: ArrayLike, clusters: Sequence[Any] | NDArray[Any]) -> float:
    """Return the smallest true difference that this many clusters would detect with 80 % power.

    Args:
        base, tuned: finite scores, (items,).
        clusters: id of each item's prompt, (items,).

    Returns:
        (t(0.975) + t(0.8)) clustered standard errors in the metric's unit, >= 0, with k - 1 degrees of freedom for k
        clusters: 2.8 with many clusters, 3.7 with five. It is 0 if all differences are equal: then the spread was not
        observed, which does not mean that there is none.

    Raises:
        ValueError: as in `paired`.

    Source: Bloom 1995, Minimum detectable effects, Evaluation Review 19.
    """
    *_, groups = checked_scores(base, tuned, clusters)
    return _detectable(groups.error, len(groups.sums))


def _detectable(error: float, clusters: int) -> float:
    """Return the minimum detectable effect: quantiles of t for the level and the power, times the standard error."""
    return float(sum(stats.t.ppf((1 - LEVEL / 2, POWER), clusters - 1))) * error


def holm_corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the same comparisons with `p_holm` and the verdict that follows from it.

    Metrics with and without a better direction are corrected for their own number.
    """
    results = list(comparisons)
    for neutral in (False, True):
        indices = [n for n, each in enumerate(results) if (each.direction == "neutral") == neutral]
        for n, p in zip(indices, holm([results[n].p for n in indices]), strict=True):
            corrected = dataclasses.replace(results[n], p_holm=float(p))
            results[n] = dataclasses.replace(corrected, verdict=verdict_of(corrected))
    return results


def interval_verdict(comparison: Comparison) -> Verdict:
    """Return the verdict of the interval alone: better, worse or differs if it does not contain 0."""
    low, high = comparison.low, comparison.high
    if low is None or high is None or low <= 0 <= high:
        return "no evidence"
    if comparison.direction == "neutral":
        return "differs"
    return "better" if (low > 0) == (comparison.direction == "higher") else "worse"


def verdict_of(comparison: Comparison) -> Verdict:
    """Return the verdict of every row of every table: the interval's, if the sign test confirms it, else "no evidence".

    The sign test confirms it in the same direction with p at most 0.05, after Holm's correction if there is one. It is
    exact for any number of clusters (`python -m tests.bench.compare_alarms`).
    """
    verdict, wins, losses = interval_verdict(comparison), comparison.wins, comparison.losses
    agrees = {"better": wins > losses, "worse": losses > wins}.get(verdict, True)
    p = comparison.p if comparison.p_holm is None else comparison.p_holm
    return verdict if agrees and p <= LEVEL else "no evidence"


def _interval(
    centre: float, influence: NDArray[np.float64], scale: float, *, enough: bool
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of a mean from the influences of the clusters on it. None without enough events."""
    if not enough:
        return None, None
    k, error = len(influence), standard_error(influence)
    if error <= 1e-12 * scale:
        half_width = 2 * abs(centre) * rate_interval(0, k)[1]
    else:
        half_width = float(stats.t.ppf(1 - LEVEL / 2, k - 1)) * error
    return centre - half_width, centre + half_width


def _check_direction(direction: str) -> None:
    """Raise ValueError unless the direction is one of `Direction`."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction {direction!r} is unknown. Use one of {', '.join(get_args(Direction))}.")
