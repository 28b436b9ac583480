"""f-divergences from the reference: they replace the log-ratio r by the score f'(e^r).

The partition function of an f-divergence cancels only in a difference of scores. So divergences are supported for the
objectives of delta, `pairwise.SUPPORTS_DIVERGENCE`, and for no others.

Departure: above e^30 the exponentials continue as straight lines, so that values and gradients stay finite. TRL's
forward KL overflows, and its alpha divergence stops the gradient at e^80.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, log_ratios, require

MAX_EXPONENT = 30.0
"""Exponent above which `_exp` is a straight line."""


def _exp(x: Tensor) -> Tensor:
    """e^x up to e^30, and its tangent above, for any shape."""
    return torch.exp(x.clamp(max=MAX_EXPONENT)) * (1 + F.relu(x - MAX_EXPONENT))


def reverse_kl(ratio: Tensor, alpha: float) -> Tensor:
    """Score of reverse KL, f(t) = t log t: the log-ratio r itself, as in DPO."""
    return ratio


def forward_kl(ratio: Tensor, alpha: float) -> Tensor:
    """Score of forward KL, f(t) = -log t + t - 1: 1 - e^-r."""
    return 1 - _exp(-ratio)


def js(ratio: Tensor, alpha: float) -> Tensor:
    """Score of the Jensen-Shannon divergence: log 2 + log sigmoid(r)."""
    return math.log(2) + F.logsigmoid(ratio)


def alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    """Score of the alpha divergence: (e^((alpha - 1) r) - 1) / (alpha - 1).

    Args:
        ratio: log-ratio r, nats, any shape.
        alpha: TRL's alpha, which is 1 - alpha of the paper. At 1 the score is r itself.
    """
    return ratio if abs(alpha - 1) < 1e-6 else (_exp((alpha - 1) * ratio) - 1) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}


def apply_divergence(
    policy_logps: LogProbs, reference_logps: LogProbs, *, divergence: str, alpha: float = 0.5
) -> tuple[LogProbs, LogProbs]:
    """Replace the log-ratios by a divergence's scores, as inputs for an objective of delta (f-DPO).

        r -> f'(e^r)

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        divergence: a name in DIVERGENCES.
        alpha: parameter of the alpha divergence, finite. The others ignore it.

    Returns:
        Policy and reference log-probs whose log-ratios are the scores. A score is 0 if r is 0.

    Raises:
        ValueError: if the divergence is unknown or alpha is not finite.

    Source: Wang et al. 2023 (2309.16240), table 1.
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
