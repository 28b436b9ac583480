"""Ratings of models from votes on their pictures: Bradley and Terry's model, on the scale of Elo.

P(a beats b) = σ(r_a - r_b), by maximum likelihood over all living votes; a tie is half a win for each side, both_bad and
skip say nothing. Each model has also half a win and half a loss against an average one, so that a model that never lost
has a finite rating. Intervals resample whole pairs: several people's votes on one pair are not independent.
Source: Bradley and Terry 1952, Biometrika 39; Chiang et al. 2024 (2403.04132) for the use on generators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from dpo_mm.labels.store import Vote

REPLICATES = 400
MEAN, POINTS = 1000.0, 400 / math.log(10)
"""The average model's rating, and points a unit of log-odds: 400 more is ten to one."""
PRIOR = 0.5
"""Wins, and losses, against an average model."""
WON = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Rating:
    """How a model stands: its rating with a 95 % interval, and the votes behind it."""

    model: str
    rating: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def ratings(
    votes: Sequence[Vote], models: Mapping[str, tuple[str | None, str | None]], *, seed: int = 0
) -> list[Rating]:
    """The models that were voted on, best first. models: the sides' models (a, b) of each pair, by id.

    Raises ValueError where no vote compares two named models.
    """
    counted = [v for v in votes if not v.again and v.said in WON and len({*models[v.pair]} - {None}) == 2]
    if not counted:
        raise ValueError(
            "no vote compares two models; a set says which they are in its columns model_a and model_b, a folder by its "
            "folders' names"
        )
    names = sorted({str(name) for vote in counted for name in models[vote.pair]})
    pairs = sorted({vote.pair for vote in counted})
    wins = np.zeros((len(pairs), len(names), len(names)))
    for vote in counted:
        a, b = (names.index(str(name)) for name in models[vote.pair])
        wins[pairs.index(vote.pair), a, b] += WON[vote.said]
        wins[pairs.index(vote.pair), b, a] += 1 - WON[vote.said]
    best = fit(wins.sum(0))
    drawn = np.random.default_rng(seed).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), REPLICATES)
    spread = np.stack([fit(np.tensordot(weights, wins, 1), start=best) for weights in drawn])
    low, high = np.quantile(MEAN + POINTS * spread, (0.025, 0.975), axis=0)
    rated = [
        Rating(name, float(MEAN + POINTS * best[n]), float(low[n]), float(high[n]), *_record(name, counted, models))
        for n, name in enumerate(names)
    ]
    return sorted(rated, key=lambda one: -one.rating)


def fit(wins: np.ndarray, *, start: np.ndarray | None = None) -> np.ndarray:
    """Strengths in log-odds, (models,), mean 0. wins: of row over column, (models, models)."""

    def cost(r: np.ndarray) -> tuple[float, np.ndarray]:
        gap = r[:, None] - r[None, :]
        lost = wins / (1 + np.exp(gap))
        value = (wins * np.logaddexp(0, -gap)).sum() + PRIOR * (np.logaddexp(0, r) + np.logaddexp(0, -r)).sum()
        return value, -lost.sum(1) + lost.sum(0) + PRIOR * np.tanh(r / 2)

    found = minimize(cost, np.zeros(len(wins)) if start is None else start, jac=True, method="L-BFGS-B").x
    return found - found.mean()


def _record(
    name: str, votes: Sequence[Vote], models: Mapping[str, tuple[str | None, str | None]]
) -> tuple[int, int, int]:
    """A model's wins, ties and losses."""
    mine = [(vote.said, models[vote.pair].index(name)) for vote in votes if name in models[vote.pair]]
    ties = sum(said == "tie" for said, _ in mine)
    wins = sum(said == "ab"[side] for said, side in mine)
    return wins, ties, len(mine) - wins - ties
