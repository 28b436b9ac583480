"""Objectives that act on each side separately: chosen up, rejected down, not only their difference.

Departures: `kto`'s reference point comes from the batch's samples, as in Diffusion-KTO, for text too (the paper mismatches
prompts and completions). `kto` sums both sides, TRL averages them: its value is half of ours. `bco_pair` has the running
mean of its paper, InternVL, ms-swift and LLaMA-Factory. TRL has none, which is `reward_shift` 0.
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
    """Prospect-theoretic loss: each side is compared with a shared reference point.

        chosen_weight (1 - s(beta r_w - z)) + rejected_weight (1 - s(z - beta r_l))

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        z: mean implicit reward of the whole batch, >= 0, scalar, without gradient. See `kto_reference`.
        chosen_weight, rejected_weight: the paper's lambda_D and lambda_U, >= 0.

    Returns:
        Sum of both sides' losses per pair, (pairs,).

    Raises:
        ValueError: if an argument is out of range.

    Source: Ethayarajh et al. 2024 (2402.01306), eq. 7; Diffusion-KTO, Li et al. 2024 (2404.04465), eq. 9.
    """
    check_beta(beta)
    check_at_least_zero(chosen_weight=chosen_weight, rejected_weight=rejected_weight)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    gain = chosen_weight * (1 - torch.sigmoid(beta * chosen - z))
    return gain + rejected_weight * (1 - torch.sigmoid(z - beta * rejected))


def kto_reference(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """KTO's reference point z: the mean implicit reward, at least 0.

    Args:
        chosen, rejected: log-ratios of all processes' batches, nats, (n,) each.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Scalar, without gradient.
    """
    return (beta * torch.cat([chosen, rejected])).mean().clamp(min=0).detach()


def bco_pair(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, reward_shift: Tensor | float) -> Tensor:
    """Binary classifier of the implicit reward: chosen above the running mean, rejected below.

        -log s(beta r_w - reward_shift) - log s(reward_shift - beta r_l)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        reward_shift: the paper's delta, scalar, without gradient. See `bco_shift`. 0 is TRL's form.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is not above 0.

    Source: BCO, Jung et al. 2024 (2404.04656).
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return -F.logsigmoid(beta * chosen - reward_shift) - F.logsigmoid(reward_shift - beta * rejected)


def bco_shift(chosen: Tensor, rejected: Tensor, *, beta: float, before: Tensor | float = 0.0, seen: int = 0) -> Tensor:
    """BCO's delta: the mean implicit reward of all log-ratios up to now, these included.

    Args:
        chosen, rejected: log-ratios of all processes' batches, nats, (n,) each.
        beta: inverse temperature, 1/nats, > 0.
        before: the earlier value.
        seen: number of log-ratios in the earlier value, both sides counted.

    Returns:
        Scalar, without gradient.
    """
    rewards = beta * torch.cat([chosen, rejected]).detach()
    return before + (rewards.mean() - before) * (len(rewards) / (seen + len(rewards)))


def nca_pair(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Noise-contrastive alignment: it keeps the absolute likelihood of the chosen side up.

        -log s(beta r_w) - 1/2 log s(-beta r_w) - 1/2 log s(-beta r_l)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,). It is 2 ln 2 if policy and reference agree.

    Raises:
        ValueError: if beta is not above 0.

    Source: Chen et al. 2024 (2402.05369), NCA for two responses.
    """
    check_beta(beta)
    chosen, rejected = (beta * r for r in log_ratios(policy_logps, reference_logps))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Self-play loss: chosen log-ratios tend to 1 / (2 beta), rejected ones to -1 / (2 beta).

        (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: 1 / the paper's eta, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is not above 0.

    Source: Wu et al. 2024 (2405.00675), eq. 4.7, with winning probabilities 1 and 0.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Anchored loss: chosen up, rejected down. For chosen sides better than the model's outputs.

        1 - s(beta r_w) + s(beta r_l)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,), in (0, 2). It is 1 if policy and reference agree.

    Raises:
        ValueError: if beta is not above 0.

    Source: D'Oosterlinck et al. 2024 (2408.06266), eq. 7.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Anchored loss: both down, rejected further. For chosen sides worse than the model's outputs.

        s(beta r_w) + 1 - s(beta delta)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,), in (0, 2). It is 1 if policy and reference agree.

    Raises:
        ValueError: if beta is not above 0.

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
