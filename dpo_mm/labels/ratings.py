"""Ratings of models from votes on their images: the Bradley-Terry model, on the Elo scale.

P(a beats b) = σ(r_a - r_b), by maximum likelihood over all active votes. A tie is half a win for each model. both_bad and
skip do not count. Each model also has half a win and half a loss against an average model, so that a model that never lost
has a finite rating. Intervals resample whole pairs, because several votes on one pair are not independent. They are at
least as wide as those of the Fisher information: if all votes agree, all resamples are alike.

Models that no chain of votes joins have no common scale. Each such group is rated alone.

Source: Bradley and Terry 1952, Biometrika 39. Chiang et al. 2024 (2403.04132) for the use on generative models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from dpo_mm.labels.store import Vote

REPLICATES = 400
MEAN_RATING, POINTS_PER_LOGIT = 1000.0, 400 / math.log(10)
"""Rating of the average model, and points per unit of log-odds: 400 points are odds of ten to one."""
Z = 1.96
"""Standard errors to the end of a 95 % interval."""
PRIOR = 0.5
"""Number of wins, and of losses, against an average model."""
WIN_OF_A = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""Wins of a per choice."""


@dataclass(frozen=True)
class Rating:
    """Rating of a model with its 95 % interval (low, high), and its wins, ties and losses.

    Ratings of different groups (0, 1, ...) are not on one scale.
    """

    model: str
    rating: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    group: int = 0


def rate_models(
    votes: Sequence[Vote], models: Mapping[str, tuple[str | None, str | None]], *, seed: int = 0
) -> list[Rating]:
    """Rate the models that were voted on, group by group, best first.

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
    groups = connected_models(list({models[vote.pair]: None for vote in counted}))
    ratings = []
    for number, names in enumerate(groups):
        members = set(names)
        votes_inside = [vote for vote in counted if models[vote.pair][0] in members]
        ratings += _rate_group(names, votes_inside, models, group=number, seed=seed)
    return ratings


def connected_models(pairs: Sequence[tuple[str | None, str | None]]) -> list[list[str]]:
    """Return the groups of models that chains of comparisons join, the largest first, each sorted."""
    names = sorted({str(name) for pair in pairs for name in pair})
    number_of = {name: number for number, name in enumerate(names)}
    indices = np.array([[number_of[str(name)] for name in pair] for pair in pairs])
    graph = coo_matrix((np.ones(len(pairs)), indices.T), shape=(len(names), len(names)))
    count, labels = connected_components(graph, directed=False)
    groups = [[name for name, label in zip(names, labels, strict=True) if label == n] for n in range(count)]
    return sorted(groups, key=lambda group: -len(group))


def _rate_group(
    names: list[str],
    votes: Sequence[Vote],
    models: Mapping[str, tuple[str | None, str | None]],
    *,
    group: int,
    seed: int,
) -> list[Rating]:
    """Rate the models of one group, best first."""
    pairs, size = sorted({vote.pair for vote in votes}), len(names)
    pair_index, name_index = ({key: n for n, key in enumerate(keys)} for keys in (pairs, names))
    pair = np.array([pair_index[vote.pair] for vote in votes])
    a, b = np.array([[name_index[str(name)] for name in models[vote.pair]] for vote in votes]).T
    won = np.array([WIN_OF_A[vote.choice] for vote in votes])
    cells = (np.concatenate([pair, pair]), np.concatenate([a * size + b, b * size + a]))
    wins = coo_matrix((np.concatenate([won, 1 - won]), cells), shape=(len(pairs), size * size)).tocsr()
    total = np.asarray(wins.sum(0)).reshape(size, size)
    best = fit_log_odds(total)
    replicates = np.stack([fit_log_odds(resampled, start=best) for resampled in _resamples(wins, size, seed)])
    half_width = Z * standard_errors(total, best)
    low, high = np.quantile(replicates, (0.025, 0.975), axis=0)
    points = MEAN_RATING + POINTS_PER_LOGIT * np.stack(
        [best, np.minimum(low, best - half_width), np.maximum(high, best + half_width)]
    )
    results = np.concatenate([won, 1 - won])
    count = lambda n, result: int(((np.concatenate([a, b]) == n) & (results == result)).sum())
    ratings = [
        Rating(
            name,
            float(points[0, n]),
            float(points[1, n]),
            float(points[2, n]),
            count(n, 1),
            count(n, 0.5),
            count(n, 0),
            group,
        )
        for n, name in enumerate(names)
    ]
    return sorted(ratings, key=lambda rating: -rating.rating)


def _resamples(wins: csr_matrix, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the wins of each bootstrap resample of the pairs, (models, models).

    Args:
        wins: number of wins of the row's model over the column's in each pair, (pairs, models * models).
    """
    generator, num_pairs = np.random.default_rng(seed), wins.shape[0]
    for _ in range(REPLICATES):
        counts = np.bincount(generator.integers(num_pairs, size=num_pairs), minlength=num_pairs)
        yield (wins.T @ counts).reshape(size, size)


def standard_errors(wins: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Compute the standard error of each strength from the Fisher information, (models,), in log-odds.

    Args:
        wins: number of wins of the row's model over the column's, (models, models).
        strengths: fitted strengths, (models,).
    """
    difference = strengths[:, None] - strengths[None, :]
    information = (wins + wins.T) / (2 + 2 * np.cosh(difference))
    hessian = np.diag(information.sum(1) + PRIOR / (1 + np.cosh(strengths))) - information
    centred = np.eye(len(strengths)) - 1 / len(strengths)
    return np.sqrt(np.diag(centred @ np.linalg.inv(hessian) @ centred))


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
