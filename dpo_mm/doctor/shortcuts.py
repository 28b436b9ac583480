"""Whether something trivial tells the winner: a sign test that knows of groups, and a logistic regression.

Both are bounded by what chance would do. Pairs of one prompt share pictures and raters, so that they count as one
throw: under the null a whole group's labels flip together, and the sum of its signs has that square as its variance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Z = 3.89
"""Standard errors that a finding must be away from chance; 1 in 10,000, both sides."""
LEAST = 0.55
"""Share of pairs below which a shortcut is too weak to speak of."""
FOLDS = 5


class Told(NamedTuple):
    """How well something tells the winner. accuracy: of all pairs, 1/2 where it says nothing; share: of the pairs whose
    sides differ in it, how often the winner has more; differ: how many those are; sure: beyond chance.
    """

    accuracy: float
    share: float
    differ: int
    sure: bool


def told_by(difference: np.ndarray, groups: np.ndarray) -> Told:
    """By which side has more of a feature. difference: winner less loser, (pairs,). groups: of each pair, (pairs,)."""
    signs = np.sign(np.nan_to_num(difference)).astype(np.int64)
    differ = int(np.abs(signs).sum())
    total = int(signs.sum())
    _, group = np.unique(groups, return_inverse=True)
    spread = float(np.sqrt((np.bincount(group, weights=signs) ** 2).sum())) if differ else 0.0
    accuracy = 0.5 + abs(total) / (2 * max(len(signs), 1))
    share = 0.5 + total / (2 * max(differ, 1))
    return Told(accuracy, share, differ, bool(spread and abs(total) > Z * spread))


def told_by_regression(differences: np.ndarray, groups: np.ndarray) -> tuple[Told, np.ndarray, np.ndarray]:
    """By a logistic regression on all features, on folds that it was not fitted on; its weights, (features,), and what
    it said of each pair, (pairs,), above 0 where it was right.

    differences: winner less loser, (pairs, features). Groups stay whole within a fold. There is no intercept, so that
    swapping the sides of a pair changes nothing.
    """
    scale = differences.std(0)
    x = differences[:, scale > 1e-6] / scale[scale > 1e-6]
    if x.shape[1] == 0 or len(x) < 2 * FOLDS:
        return Told(0.5, 0.5, 0, False), np.zeros(differences.shape[1]), np.zeros(len(x))
    _, group = np.unique(groups, return_inverse=True)
    fold = np.random.default_rng(0).integers(FOLDS, size=group.max() + 1)[group]
    predicted = np.zeros(len(x))
    for n in range(FOLDS):
        if (fold != n).any():
            predicted[fold == n] = x[fold == n] @ _fit(x[fold != n])
    weights = np.zeros(differences.shape[1])
    weights[scale > 1e-6] = _fit(x)
    return told_by(predicted, groups), weights, predicted


def _fit(x: np.ndarray) -> np.ndarray:
    """Weights that maximise the log-likelihood that the first side wins, with a little ridge, (features,)."""
    from scipy.optimize import minimize
    from scipy.special import expit

    loss = lambda w: (np.logaddexp(0, -x @ w).mean() + 1e-3 * w @ w, -(x.T @ expit(-x @ w)) / len(x) + 2e-3 * w)
    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
