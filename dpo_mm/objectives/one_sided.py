"""Objectives that score each side by itself: chosen up and rejected down, not only their difference.

Symbols, for one pair: w is chosen and l is rejected. r = log p_policy - log p_reference is the log-ratio, beta * r the
implicit reward and delta = r_w - r_l. s(x) = 1 / (1 + e^-x).

Departures from the papers and from TRL:

- `kto` takes its reference point from the batch's own samples, as Diffusion-KTO does, for text too. The KTO paper
  mismatches prompts and completions instead.
- `kto` is the sum of both sides. TRL takes their mean, which is half of it.
- `bco_pair` has the running mean of its paper, InternVL, ms-swift and LLaMA-Factory. TRL has none: `reward_shift` 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, check_at_least_zero, check_beta, log_ratios


def kto(
    policy_logps: LogProbs,
    reference_logps: LogProbs,
    *,
    beta: float,
    z: Tensor,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> Tensor:
    """Prospect-theoretic loss of each side against a shared reference point (KTO).

        lambda_w * (1 - s(beta * r_w - z)) + lambda_l * (1 - s(z - beta * r_l))

    A side counts as a gain or a loss compared with z, and both saturate far from it.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        z: mean implicit reward of both sides of the whole batch, >= 0, without gradient, scalar. See `kto_reference`.
        chosen_weight: lambda_w, the paper's lambda_D, >= 0.
        rejected_weight: lambda_l, the paper's lambda_U, >= 0.

    Returns:
        Sum of both sides' losses per pair, (pairs,).

    Raises:
        ValueError: if beta or a weight is out of range.

    Source: Ethayarajh et al. 2024 (2402.01306), eq. 7; Diffusion-KTO, Li et al. 2024 (2404.04465), eq. 9.
    """
    check_beta(beta)
    check_at_least_zero(chosen_weight=chosen_weight, rejected_weight=rejected_weight)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    gain = chosen_weight * (1 - torch.sigmoid(beta * chosen - z))
    return gain + rejected_weight * (1 - torch.sigmoid(z - beta * rejected))


def kto_reference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Reference point z of `kto`: the mean implicit reward, at least 0.

        max(0, mean(beta * r))

    Args:
        chosen: log-ratios of the chosen sides of all processes' batches, nats, (n,).
        rejected: the same of the rejected sides.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Scalar without gradient.
    """
    return (beta * torch.cat([chosen, rejected])).mean().clamp(min=0).detach()


def bco_pair(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, reward_shift: Tensor | float) -> Tensor:
    """Logistic loss of a binary classifier of the implicit reward (BCO).

        -log s(beta * r_w - d) - log s(d - beta * r_l),  d = reward_shift

    Chosen sides are classified as above the running mean of all rewards, and rejected sides as below it.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        reward_shift: the paper's delta, a scalar without gradient. See `bco_shift`. TRL's version is 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is out of range.

    Source: Jung et al. 2024 (2404.04656).
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return -F.logsigmoid(beta * chosen - reward_shift) - F.logsigmoid(reward_shift - beta * rejected)


def bco_shift(
    chosen: Tensor, rejected: Tensor, *, beta: float, previous_mean: Tensor | float = 0.0, previous_count: int = 0
) -> Tensor:
    """Reward shift of `bco_pair`: the running mean of the implicit rewards, updated with these log-ratios.

    Args:
        chosen: log-ratios of the chosen sides of all processes' batches, nats, (n,).
        rejected: the same of the rejected sides.
        beta: inverse temperature, 1/nats, > 0.
        previous_mean: result for the previous batches.
        previous_count: number of rewards in `previous_mean`, both sides counted.

    Returns:
        Scalar without gradient.
    """
    rewards = beta * torch.cat([chosen, rejected]).detach()
    return previous_mean + (rewards.mean() - previous_mean) * (len(rewards) / (previous_count + len(rewards)))


def nca_pair(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Noise-contrastive loss that holds the likelihood of the chosen side (NCA).

        -log s(beta * r_w) - 1/2 log s(-beta * r_w) - 1/2 log s(-beta * r_l)

    It optimises the absolute likelihood of the chosen side, not only its lead over the rejected side.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,). It is 2 ln 2 if policy and reference agree.

    Raises:
        ValueError: if beta is out of range.

    Source: Chen et al. 2024 (2402.05369), NCA for two responses.
    """
    check_beta(beta)
    chosen, rejected = (beta * r for r in log_ratios(policy_logps, reference_logps))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Squared distance of both log-ratios from opposite targets (self-play, SPPO).

        (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2

    Each side has a fixed target, so the chosen log-ratio rises by itself and not only against the rejected one.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse of the paper's eta, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is out of range.

    Source: Wu et al. 2024 (2405.00675), eq. 4.7 with winning probabilities 1 and 0.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Anchored loss for chosen sides that are better than the model's own outputs (APO-zero).

        1 - s(beta * r_w) + s(beta * r_l)

    The likelihood of the chosen side rises and that of the rejected side falls, both compared with the reference.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,), in (0, 2). It is 1 if policy and reference agree.

    Raises:
        ValueError: if beta is out of range.

    Source: D'Oosterlinck et al. 2024 (2408.06266), eq. 7.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Anchored loss for chosen sides that are worse than the model's own outputs (APO-down).

        s(beta * r_w) + 1 - s(beta * delta)

    The likelihood of both sides falls, and that of the rejected side falls further.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,), in (0, 2). It is 1 if policy and reference agree.

    Raises:
        ValueError: if beta is out of range.

    Source: D'Oosterlinck et al. 2024 (2408.06266), eq. 8.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


ONE_SIDED: dict[str, Callable[..., Tensor]] = {
    "kto": kto,
    "bco_pair": bco_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}
