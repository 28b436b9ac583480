"""Ratings of models from votes on their images: the Bradley-Terry model, on the Elo scale.

P(a beats b) = σ(r_a - r_b), by maximum likelihood over all active votes. A tie is half a win for each model. both_bad and
skip do not count. Each model also has half a win and half a loss against an average model, so that a model that never lost
has a finite rating. Intervals resample whole pairs, because several votes on one pair are not independent.

Source: Bradley and Terry 1952, Biometrika 39. Chiang et al. 2024 (2403.04132) for the use on generative models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from dpo_mm.labels.store import Vote

REPLICATES = 400
MEAN_RATING, POINTS_PER_LOGIT = 1000.0, 400 / math.log(10)
"""Rating of the average model, and points per unit of log-odds: 400 points are odds of ten to one."""
PRIOR = 0.5
"""Number of wins, and of losses, against an average model."""
WIN_OF_A = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""Wins of a per choice."""


@dataclass(frozen=True)
class Rating:
    """Rating of a model with its 95 % interval (low, high), and its wins, ties and losses."""

    model: str
    rating: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def rate_models(
    votes: Sequence[Vote], models: Mapping[str, tuple[str | None, str | None]], *, seed: int = 0
) -> list[Rating]:
    """Rate the models that were voted on, best first.

    Args:
        votes: active votes. Repeats are ignored.
        models: models of a and b of each pair, by pair id. Pairs with an unknown model are ignored.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if no vote compares two named models.
    """
    counted = [v for v in votes if not v.is_repeat and v.choice in WIN_OF_A and len({*models[v.pair]} - {None}) == 2]
    if not counted:
        raise ValueError(
            "no vote compares two models. A dataset names them in the columns model_a and model_b, a folder by the names "
            "of its subfolders"
        )
    names = sorted({str(name) for vote in counted for name in models[vote.pair]})
    pairs = sorted({vote.pair for vote in counted})
    wins = np.zeros((len(pairs), len(names), len(names)))
    for vote in counted:
        a, b = (names.index(str(name)) for name in models[vote.pair])
        wins[pairs.index(vote.pair), a, b] += WIN_OF_A[vote.choice]
        wins[pairs.index(vote.pair), b, a] += 1 - WIN_OF_A[vote.choice]
    best = fit_log_odds(wins.sum(0))
    counts = np.random.default_rng(seed).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), REPLICATES)
    replicates = np.stack([fit_log_odds(np.tensordot(weights, wins, 1), start=best) for weights in counts])
    points = MEAN_RATING + POINTS_PER_LOGIT * best
    low, high = np.quantile(MEAN_RATING + POINTS_PER_LOGIT * replicates, (0.025, 0.975), axis=0)
    ratings = [
        Rating(name, float(points[n]), float(low[n]), float(high[n]), *_record(name, counted, models))
        for n, name in enumerate(names)
    ]
    return sorted(ratings, key=lambda rating: -rating.rating)


def fit_log_odds(wins: np.ndarray, *, start: np.ndarray | None = None) -> np.ndarray:
    """Fit the strengths of the models in log-odds, (models,), with mean 0.

    Args:
        wins: number of wins of the row's model over the column's, (models, models).
        start: initial strengths, (models,).
    """

    def cost(r: np.ndarray) -> tuple[float, np.ndarray]:
        difference = r[:, None] - r[None, :]
        residual = wins / (1 + np.exp(difference))
        value = (wins * np.logaddexp(0, -difference)).sum() + PRIOR * (np.logaddexp(0, r) + np.logaddexp(0, -r)).sum()
        return value, -residual.sum(1) + residual.sum(0) + PRIOR * np.tanh(r / 2)

    strengths = minimize(cost, np.zeros(len(wins)) if start is None else start, jac=True, method="L-BFGS-B").x
    return strengths - strengths.mean()


def _record(
    name: str, votes: Sequence[Vote], models: Mapping[str, tuple[str | None, str | None]]
) -> tuple[int, int, int]:
    """Count a model's wins, ties and losses."""
    results = [(vote.choice, models[vote.pair].index(name)) for vote in votes if name in models[vote.pair]]
    ties = sum(choice == "tie" for choice, _ in results)
    wins = sum(choice == "ab"[index] for choice, index in results)
    return wins, ties, len(results) - wins - ties
