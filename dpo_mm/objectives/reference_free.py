"""Objectives that need no reference model.

Symbols, for one pair: w is chosen and l is rejected, log p is the policy's log-prob and s(x) = 1 / (1 + e^-x). A bar is
the mean per token. On images `sft`, `simpo` and `cpo` use the surrogate log p = -err / 2, and their likelihood term is
the denoising error err_w.

Departures from TRL, in the likelihood term of `orpo` and `cpo`:

- It counts only the completion's tokens. TRL's ORPO counts the prompt's tokens too.
- It is a mean per pair. TRL averages over all tokens of the batch, so that a long completion counts more there.
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

MAX_LOG_PROB = -1e-7
"""Largest mean log-prob per token of which `orpo` computes the odds. They are infinite at 0."""


def sft(policy_logps: LogProbs) -> Tensor:
    """Plain fine-tuning on the chosen side (SFT).

        -log p_bar_w for text, err_w for images

    It imitates the chosen side and ignores the rejected one.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.

    Returns:
        Loss per pair, (pairs,): mean negative log-likelihood per token, or denoising error of an image.

    Source: RPO's SFT term, Pang et al. 2024 (2404.19733), eq. 2. For images, the loss that denoisers are trained with.
    """
    if policy_logps.is_likelihood:
        return -policy_logps.chosen / policy_logps.num_tokens_chosen
    return denoising_errors(policy_logps)[0]


def orpo(policy_logps: LogProbs, *, ratio_weight: float = 0.1) -> Tensor:
    """Fine-tuning on the chosen side plus a term that raises its odds over the rejected side's (ORPO).

        -log p_bar_w - lambda log s(log odds_w - log odds_l),  odds = p_bar / (1 - p_bar),  lambda = ratio_weight

    It trains a base model in one stage. Text only.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        ratio_weight: the paper's lambda, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if the log-probs are denoising surrogates, or ratio_weight is out of range.

    Source: Hong et al. 2024 (2403.07691), eq. 6 and 7, lambda 0.1.
    """
    check_likelihood(policy_logps, "orpo")
    check_at_least_zero(ratio_weight=ratio_weight)
    chosen = policy_logps.chosen / policy_logps.num_tokens_chosen
    rejected = policy_logps.rejected / policy_logps.num_tokens_rejected
    return sft(policy_logps) - ratio_weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_prob: Tensor) -> Tensor:
    """log p - log(1 - p) for log-probs below 0, any shape."""
    clamped = log_prob.clamp(max=MAX_LOG_PROB)
    return clamped - torch.log(-torch.expm1(clamped))


def simpo(policy_logps: LogProbs, *, beta: float, target_margin: float = 1.375, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on the difference of mean log-probs per token, with a target margin (SimPO).

        -log s(beta * (log p_bar_w - log p_bar_l) - gamma),  gamma = target_margin

    The mean per token is the reward itself, so that no reference is needed and length is not rewarded. With label
    smoothing e, the loss is the same mixture as in `sigmoid`.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0. The paper uses 2.5.
        target_margin: the paper's gamma, in units of beta * nats, >= 0.
        label_smoothing: fraction of labels assumed to be flipped, in [0, 0.5).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta, target_margin or label_smoothing is out of range.

    Source: Meng et al. 2024 (2405.14734), eq. 6.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check_at_least_zero(target_margin=target_margin)
    chosen = policy_logps.chosen / policy_logps.num_tokens_chosen
    rejected = policy_logps.rejected / policy_logps.num_tokens_rejected
    return smoothed_logsigmoid_loss(beta * (chosen - rejected) - target_margin, label_smoothing)


def cpo(policy_logps: LogProbs, *, beta: float, nll_weight: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss with a uniform reference, plus fine-tuning on the chosen side (CPO).

        -log s(beta * (log p_w - log p_l)) + n * sft,  n = nll_weight

    The fine-tuning term keeps the policy close to the chosen data, as a reference model would. With label smoothing e,
    the first term is the same mixture as in `sigmoid`.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        nll_weight: weight of the fine-tuning term, >= 0.
        label_smoothing: fraction of labels assumed to be flipped, in [0, 0.5).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta, nll_weight or label_smoothing is out of range.

    Source: Xu et al. 2024 (2401.08417), with eq. 3 as the preference term.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    check_at_least_zero(nll_weight=nll_weight)
    preference = smoothed_logsigmoid_loss(beta * (policy_logps.chosen - policy_logps.rejected), label_smoothing)
    return preference + nll_weight * sft(policy_logps)


REFERENCE_FREE: dict[str, Callable[..., Tensor]] = {"sft": sft, "orpo": orpo, "simpo": simpo, "cpo": cpo}
