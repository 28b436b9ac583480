"""Objectives that ask no reference.

Departures: the likelihood term of `orpo` and `cpo` counts the completion alone (TRL's ORPO counts the prompt's tokens
too) and is a mean a pair; TRL averages over all tokens of the batch, so that a long completion weighs more there.
On images `sft`, `simpo` and `cpo` act on the surrogate -1/2 * error, and the likelihood term is the denoising error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import (
    LogProbs,
    check_at_least_zero,
    check_beta,
    check_likelihood,
    check_smoothing,
    denoising_errors,
    smoothed_logsigmoid_loss,
)

SURE = -1e-7
"""Largest log-prob a token whose odds are asked for; at 0 they are infinite."""


def sft(policy: LogProbs) -> Tensor:
    """Plain fine-tuning on the chosen side: mean negative log-likelihood a token; an image's denoising error.

    Returns (pairs,). Source: the SFT term of RPO, Pang et al. 2024 (2404.19733) eq. 2; for images, the training loss.
    """
    return -policy.chosen / policy.num_tokens_chosen if policy.is_likelihood else denoising_errors(policy)[0]


def orpo(policy: LogProbs, *, ratio_weight: float = 0.1) -> Tensor:
    """Fine-tuning on the chosen side, with a term that raises its odds over the rejected side's. Text alone.

    ratio_weight: the paper's lambda, >= 0. Odds are of the mean log-prob a token. Returns (pairs,).
    Raises ValueError for a denoising surrogate, which is no likelihood, and outside the range.
    Source: Hong et al. 2024 (2403.07691) eq. 6 and 7, lambda 0.1.
    """
    check_likelihood(policy, "orpo")
    check_at_least_zero(ratio_weight=ratio_weight)
    odds = _log_odds(policy.chosen / policy.num_tokens_chosen) - _log_odds(policy.rejected / policy.num_tokens_rejected)
    return sft(policy) - ratio_weight * F.logsigmoid(odds)


def _log_odds(log_prob: Tensor) -> Tensor:
    """log p - log (1 - p), of log-probs below 0, any shape."""
    sure = log_prob.clamp(max=SURE)
    return sure - torch.log(-torch.expm1(sure))


def simpo(policy: LogProbs, *, beta: float, target_margin: float = 1.375, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on the difference of mean log-probs a token, with a margin asked for.

    beta: 1/nats, > 0; 2.5 in the paper's runs. target_margin: the paper's gamma, in units of beta * nats, >= 0.
    label_smoothing: share of flipped labels, [0, 0.5). Returns (pairs,). Raises ValueError outside the ranges.
    Source: Meng et al. 2024 (2405.14734) eq. 6.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check_at_least_zero(target_margin=target_margin)
    delta = policy.chosen / policy.num_tokens_chosen - policy.rejected / policy.num_tokens_rejected
    return smoothed_logsigmoid_loss(beta * delta - target_margin, label_smoothing)


def cpo(policy: LogProbs, *, beta: float, nll_weight: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO with a uniform reference, and fine-tuning on the chosen side to keep the policy in place.

    beta: 1/nats, > 0. nll_weight: >= 0. label_smoothing: share of flipped labels, [0, 0.5). Returns (pairs,).
    Raises ValueError outside the ranges. Source: Xu et al. 2024 (2401.08417), with eq. 3 as the preference term.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check_at_least_zero(nll_weight=nll_weight)
    return smoothed_logsigmoid_loss(beta * (policy.chosen - policy.rejected), label_smoothing) + nll_weight * sft(
        policy
    )


REFERENCE_FREE: dict[str, Callable[..., Tensor]] = {"sft": sft, "orpo": orpo, "simpo": simpo, "cpo": cpo}
