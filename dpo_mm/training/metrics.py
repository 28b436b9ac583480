"""What a step logs beside its loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpo_mm import objectives
from dpo_mm.objectives import LogProbs


def split_by_noise_quartile(found: Mapping[str, Tensor], level: Tensor) -> dict[str, Tensor]:
    """Accuracy and margin again, by quarter of the noise schedule, NaN for pairs of another quarter; (pairs,) each.

    level: where in the schedule each pair was drawn, [0, 1), (pairs,); the first quarter is the cleanest.
    """
    quarter = (level * 4).long()
    return {
        f"{name}_quartile{n + 1}": found[name].masked_fill(quarter != n, torch.nan)
        for name in ("rewards/accuracies", "rewards/margins")
        for n in range(4)
    }


def reward_metrics(policy: LogProbs, reference: LogProbs, *, beta: float) -> dict[str, Tensor]:
    """What is watched beside the loss, each (pairs,).

    accuracy: 1 where the implicit reward prefers the chosen side, 1/2 at a tie. reward_*, margin: beta * log-ratio;
    margin_size: its absolute value.
    error_* (surrogates alone): denoising error relative to the reference's, 1 where it is the same.
    """
    chosen, rejected = objectives.log_ratios(policy, reference)
    delta = objectives.deltas(policy, reference)
    found = {
        "rewards/accuracies": (delta > 0).float() + 0.5 * (delta == 0).float(),
        "rewards/margins": beta * delta,
        "rewards/absolute_margins": (beta * delta).abs(),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
    }
    if not policy.is_likelihood:
        found["errors/chosen"] = policy.chosen / reference.chosen
        found["errors/rejected"] = policy.rejected / reference.rejected
    return {name: value.detach() for name, value in found.items()}


def image_reliance(policy: LogProbs, reference: LogProbs, corrupted_ratio: Tensor) -> Tensor:
    """1 where the chosen answer's implicit reward is higher with its image than with what is left of it, (pairs,)."""
    return (objectives.log_ratios(policy, reference)[0] > corrupted_ratio).float().detach()
