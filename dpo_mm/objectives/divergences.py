"""f-divergences from the reference: the score f'(e^r) replaces the log-ratio r.

The partition function of a divergence cancels only in a difference of scores, so divergences apply to the objectives of
delta (`pairwise.SUPPORTS_DIVERGENCE`) and to no others. Departure: past e^30 the exponentials continue as straight lines, so
that values and gradients are finite (TRL's forward KL overflows; its alpha divergence stops the gradient at e^80).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, log_ratios, require

STEEPEST = 30.0
"""Exponent past which `_exp` is a straight line."""


def _exp(x: Tensor) -> Tensor:
    """Return e^x up to e^30 and its tangent above, any shape."""
    return torch.exp(x.clamp(max=STEEPEST)) * (1 + F.relu(x - STEEPEST))


def reverse_kl(ratio: Tensor, alpha: float) -> Tensor:
    """f(t) = t log t: r itself, DPO's own."""
    return ratio


def forward_kl(ratio: Tensor, alpha: float) -> Tensor:
    """f(t) = -log t + t - 1: 1 - e^-r."""
    return 1 - _exp(-ratio)


def js(ratio: Tensor, alpha: float) -> Tensor:
    """Jensen-Shannon: log 2 + log sigmoid(r)."""
    return math.log(2) + F.logsigmoid(ratio)


def alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    """(e^((alpha - 1) r) - 1) / (alpha - 1); r itself at alpha 1. TRL's alpha; the paper's is 1 - alpha."""
    return ratio if abs(alpha - 1) < 1e-6 else (_exp((alpha - 1) * ratio) - 1) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}


def scored(
    policy_logps: LogProbs, reference_logps: LogProbs, *, divergence: str, alpha: float = 0.5
) -> tuple[LogProbs, LogProbs]:
    """Replace log-ratios by an f-divergence's scores f'(e^r), for an objective of delta.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        divergence: a name in DIVERGENCES.
        alpha: parameter of the alpha divergence, finite. Others ignore it.

    Returns:
        Policy and reference whose log-ratios are the scores. A score is 0 if r is 0.

    Raises:
        ValueError: if the divergence is unknown or alpha is not finite.

    Source: f-DPO, Wang et al. 2023 (2309.16240), table 1.
    """
    if divergence not in DIVERGENCES:
        from dpo_mm.errors import did_you_mean

        raise ValueError(f"divergence {divergence!r} is unknown; {did_you_mean(divergence, DIVERGENCES)}")
    require(math.isfinite(alpha), f"the divergence's alpha must be finite, got {alpha}")
    chosen, rejected = (DIVERGENCES[divergence](r, alpha) for r in log_ratios(policy_logps, reference_logps))
    zero = torch.zeros_like(chosen)
    return (
        dataclasses.replace(policy_logps, chosen=chosen, rejected=rejected),
        dataclasses.replace(reference_logps, chosen=zero, rejected=zero),
    )
