"""Differences of paired scores by cluster: the items of one prompt are repeats of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Clusters:
    """Sum of the differences and number of items of each cluster, (clusters,) each."""

    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean difference over items."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def influence(self) -> NDArray[np.float64]:
        """Influence of each cluster on the mean over items, with mean 0, (clusters,)."""
        return (self.sums - self.mean * self.sizes) / self.sizes.mean()

    @property
    def error(self) -> float:
        """Standard error of the mean over items if clusters are a random sample (a ratio estimator)."""
        return standard_error(self.influence)


def standard_error(influence: NDArray[np.float64]) -> float:
    """Return the standard error of a mean from the influences on it, (clusters,)."""
    return float(np.sqrt((influence**2).sum() / (len(influence) * (len(influence) - 1))))


def checked_scores(
    base: ArrayLike, tuned: ArrayLike, clusters: Sequence[Any] | NDArray[Any], weights: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], Clusters]:
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
    return before, after, Clusters(sums.astype(np.float64), sizes.astype(np.float64))


def sign_votes(groups: Clusters, scale: float) -> NDArray[np.int64]:
    """Return the sign of each cluster's mean difference, (clusters,). A mean within rounding of 0 is a tie."""
    means = groups.sums / groups.sizes
    return np.where(np.abs(means) <= 1e-12 * scale, 0, np.sign(means)).astype(np.int64)
