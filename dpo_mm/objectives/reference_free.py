"""Objectives without a reference model.

Departures: the likelihood term of `orpo` and `cpo` counts only the completion (TRL's ORPO also counts the prompt's tokens)
and is a mean per pair. TRL averages over all tokens of the batch, so long completions weigh more there. On images `sft`,
`simpo` and `cpo` act on the surrogate -1/2 * error, and the likelihood term is the denoising error.
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
"""Largest log-prob per token whose odds are computed. At 0 they are infinite."""


def sft(policy_logps: LogProbs) -> Tensor:
    """Supervised fine-tuning on the chosen side.

        -log p_w per token for text, err_w for images

    Args:
        policy_logps: log-probs of chosen and rejected, nats, (pairs,) each.

    Returns:
        Loss per pair, (pairs,).

    Source: the SFT term of RPO, Pang et al. 2024 (2404.19733), eq. 2; for images, the training loss.
    """
    return (
        -policy_logps.chosen / policy_logps.num_tokens_chosen
        if policy_logps.is_likelihood
        else denoising_errors(policy_logps)[0]
    )


def orpo(policy_logps: LogProbs, *, ratio_weight: float = 0.1) -> Tensor:
    """Fine-tuning on the chosen side, with a term that raises its odds over the rejected side's.

        sft - ratio_weight log s(log odds_w - log odds_l),  odds of the mean log-prob per token

    Only for text.

    Args:
        policy_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        ratio_weight: the paper's lambda, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: for a denoising surrogate, which is not a likelihood, or if ratio_weight is negative.

    Source: Hong et al. 2024 (2403.07691), eq. 6 and 7, with lambda 0.1.
    """
    check_likelihood(policy_logps, "orpo")
    check_at_least_zero(ratio_weight=ratio_weight)
    odds = _log_odds(policy_logps.chosen / policy_logps.num_tokens_chosen) - _log_odds(
        policy_logps.rejected / policy_logps.num_tokens_rejected
    )
    return sft(policy_logps) - ratio_weight * F.logsigmoid(odds)


def _log_odds(log_prob: Tensor) -> Tensor:
    """log p - log (1 - p), of log-probs below 0, any shape."""
    sure = log_prob.clamp(max=SURE)
    return sure - torch.log(-torch.expm1(sure))


def simpo(policy_logps: LogProbs, *, beta: float, target_margin: float = 1.375, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on the difference of mean log-probs per token, with a target margin.

        -log s(beta (log p_w / tokens_w - log p_l / tokens_l) - target_margin)

    Args:
        policy_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: 1/nats, > 0. The paper uses 2.5.
        target_margin: the paper's gamma, in units of beta times nats, >= 0.
        label_smoothing: fraction of labels assumed to be flipped, [0, 0.5).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if an argument is out of range.

    Source: Meng et al. 2024 (2405.14734), eq. 6.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check_at_least_zero(target_margin=target_margin)
    delta = (
        policy_logps.chosen / policy_logps.num_tokens_chosen - policy_logps.rejected / policy_logps.num_tokens_rejected
    )
    return smoothed_logsigmoid_loss(beta * delta - target_margin, label_smoothing)


def cpo(policy_logps: LogProbs, *, beta: float, nll_weight: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO with a uniform reference, plus fine-tuning on the chosen side.

        -log s(beta (log p_w - log p_l)) + nll_weight sft

    Args:
        policy_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        nll_weight: >= 0.
        label_smoothing: fraction of labels assumed to be flipped, [0, 0.5).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if an argument is out of range.

    Source: Xu et al. 2024 (2401.08417), with eq. 3 as the preference term.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check_at_least_zero(nll_weight=nll_weight)
    return smoothed_logsigmoid_loss(
        beta * (policy_logps.chosen - policy_logps.rejected), label_smoothing
    ) + nll_weight * sft(policy_logps)


REFERENCE_FREE: dict[str, Callable[..., Tensor]] = {"sft": sft, "orpo": orpo, "simpo": simpo, "cpo": cpo}
