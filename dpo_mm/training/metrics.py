"""Metrics of a step: rewards, accuracies, errors and reliance on the image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpo_mm import objectives
from dpo_mm.objectives import LogProbs


def log_prob_metrics(policy: LogProbs) -> dict[str, Tensor]:
    """Log-probs of both sides, nats, (pairs,) each. Rows with a chosen image only have none: it would repeat their loss."""
    metrics = {"logps/chosen": policy.chosen.detach(), "logps/rejected": policy.rejected.detach()}
    if policy.rejected.numel():
        return metrics
    return {"logps/chosen": metrics["logps/chosen"]} if policy.is_likelihood else {}


def split_by_noise_quartile(metrics: Mapping[str, Tensor], level: Tensor) -> dict[str, Tensor]:
    """Repeat accuracies and margins for each quartile of the noise schedule.

    Args:
        metrics: values by name, (pairs,) each.
        level: noise level of each pair, [0, 1), (pairs,). The first quartile is the cleanest.

    Returns:
        Metrics per quartile, (pairs,) each, NaN for pairs of another quartile.
    """
    quarter = (level * 4).long()
    return {
        f"{name}_quartile{n + 1}": metrics[name].masked_fill(quarter != n, torch.nan)
        for name in ("rewards/accuracies", "rewards/margins")
        for n in range(4)
    }


def reward_metrics(policy: LogProbs, reference: LogProbs, *, beta: float) -> dict[str, Tensor]:
    """Compute TRL's reward metrics, and relative errors for images.

    Args:
        policy, reference: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats.

    Returns:
        (pairs,) each. rewards/accuracies: 1 if the implicit reward prefers chosen, 1/2 for a tie. rewards/chosen, /rejected and
        /margins: beta times the log-ratio. rewards/absolute_margins: their absolute value. errors/chosen, /rejected (images only):
        denoising error relative to the reference's, 1 if equal.
    """
    chosen, rejected = objectives.log_ratios(policy, reference)
    delta = objectives.deltas(policy, reference)
    metrics = {
        "rewards/accuracies": (delta > 0).float() + 0.5 * (delta == 0).float(),
        "rewards/margins": beta * delta,
        "rewards/absolute_margins": (beta * delta).abs(),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
    }
    if not policy.is_likelihood:
        metrics["errors/chosen"] = policy.chosen / reference.chosen
        metrics["errors/rejected"] = policy.rejected / reference.rejected
    return {name: value.detach() for name, value in metrics.items()}


def image_reliance(policy: LogProbs, reference: LogProbs, corrupted_ratio: Tensor) -> Tensor:
    """Return 1 for a pair whose chosen response has a higher implicit reward with its image than with a corrupted one."""
    return (objectives.log_ratios(policy, reference)[0] > corrupted_ratio).float().detach()
