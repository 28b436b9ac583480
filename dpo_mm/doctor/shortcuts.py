"""Tests of whether a trivial feature predicts the winner: a sign test clustered by prompt, and a logistic regression.

Both allow for chance. Pairs of one prompt share images and raters, so they count as one observation. Under the null
hypothesis the labels of a whole group flip together, and the variance of the sum of its signs is the square of that sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Z = 3.89
"""Standard errors from chance that a finding needs: p < 0.0001, two-sided."""
MIN_GROUPS = math.floor(Z**2) + 1
"""Prompts below which no feature can be significant: of n prompts, the sum of signs is at most √n standard errors."""
MIN_ACCURACY = 0.55
"""Accuracy below which a shortcut is too weak to report."""
FOLDS = 5


class ShortcutTest(NamedTuple):
    """Result of a test of how well a feature predicts the winner.

    Args:
        accuracy: fraction of all pairs predicted correctly, 1/2 if the feature carries no information.
        fraction_more: of the pairs that differ in the feature, the fraction whose winner has more of it.
        num_differing: number of pairs that differ in the feature.
        significant: the effect is more than Z standard errors from chance.
    """

    accuracy: float
    fraction_more: float
    num_differing: int
    significant: bool


def run_sign_test(differences: np.ndarray, groups: np.ndarray) -> ShortcutTest:
    """Test whether the winner of a pair tends to have more, or less, of a feature.

    Args:
        differences: the feature of the winner less that of the loser, (pairs,).
        groups: group (prompt) of each pair, (pairs,).
    """
    signs = np.sign(np.nan_to_num(differences)).astype(np.int64)
    num_differing = int(np.abs(signs).sum())
    total = int(signs.sum())
    _, group = np.unique(groups, return_inverse=True)
    standard_error = float(np.sqrt((np.bincount(group, weights=signs) ** 2).sum())) if num_differing else 0.0
    accuracy = 0.5 + abs(total) / (2 * max(len(signs), 1))
    fraction_more = 0.5 + total / (2 * max(num_differing, 1))
    significant = bool(standard_error and abs(total) > Z * standard_error)
    return ShortcutTest(accuracy, fraction_more, num_differing, significant)


class RegressionTest(NamedTuple):
    """Result of the regression test.

    Args:
        test: sign test of the scores.
        weights: weights of the standardised features, (features,).
        scores: cross-validated scores, (pairs,), above 0 if the winner is predicted correctly.
    """

    test: ShortcutTest
    weights: np.ndarray
    scores: np.ndarray


def run_regression_test(differences: np.ndarray, groups: np.ndarray) -> RegressionTest:
    """Test whether a logistic regression on all features predicts the winner, by cross-validation.

    A group stays within one fold. There is no intercept, so swapping a and b of a pair changes nothing.

    Args:
        differences: the features of the winner less those of the loser, (pairs, features).
        groups: group (prompt) of each pair, (pairs,).
    """
    scale = differences.std(0)
    x = differences[:, scale > 1e-6] / scale[scale > 1e-6]
    if x.shape[1] == 0 or len(x) < 2 * FOLDS:
        return RegressionTest(ShortcutTest(0.5, 0.5, 0, False), np.zeros(differences.shape[1]), np.zeros(len(x)))
    _, group = np.unique(groups, return_inverse=True)
    fold = np.random.default_rng(0).integers(FOLDS, size=group.max() + 1)[group]
    scores = np.zeros(len(x))
    for n in range(FOLDS):
        if (fold != n).any():
            scores[fold == n] = x[fold == n] @ _fit_weights(x[fold != n])
    weights = np.zeros(differences.shape[1])
    weights[scale > 1e-6] = _fit_weights(x)
    return RegressionTest(run_sign_test(scores, groups), weights, scores)


def _fit_weights(x: np.ndarray) -> np.ndarray:
    """Maximise the log-likelihood that the winner wins, with a small ridge penalty. Return the weights, (features,)."""
    from scipy.optimize import minimize
    from scipy.special import expit

    loss = lambda w: (np.logaddexp(0, -x @ w).mean() + 1e-3 * w @ w, -(x.T @ expit(-x @ w)) / len(x) + 2e-3 * w)
    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
