"""Objectives for image generators.

Departures: `sdpo` has one scale per pair. The authors' code has one per micro-batch, so its result depends on the batch
size. `linear`'s margin is the paper's, of whole errors, which is twice delta.
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
    check_denoising,
    deltas,
    denoising_errors,
    log_ratios,
    require,
    sdpo_lambda,
)


def sdpo(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, rejected_gradient_scale: Tensor) -> Tensor:
    """`sigmoid` with a scaled gradient of the rejected side, so that the chosen error does not rise.

        -log s(beta (r_w - lambda r_l)),  with the value of `sigmoid` and lambda only in the gradient

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        rejected_gradient_scale: lambda, [0, 1], (pairs,), without gradient. See `sdpo_lambda_image`.

    Returns:
        Loss per pair, (pairs,). Its value is that of `sigmoid`.

    Raises:
        ValueError: if beta is not above 0.

    Source: Diffusion-SDPO, Fu et al. 2025 (2511.03317).
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    rejected = rejected.detach() + rejected_gradient_scale * (rejected - rejected.detach())
    return -F.logsigmoid(beta * (chosen - rejected))


def sdpo_lambda_image(chosen_gradient: Tensor, rejected_gradient: Tensor, *, slack: float) -> Tensor:
    """Largest scale of the rejected gradient that keeps the chosen error from rising.

        clip((1 - slack) |g_w|^2 / <g_l, g_w>, 0, 1), and 1 if <g_l, g_w> <= 0

    Args:
        chosen_gradient, rejected_gradient: gradient of each side's error with respect to the network's output, (pairs, ...).
            For a denoiser prediction - target is enough, because a common factor cancels.
        slack: the paper's mu, [0, 1). 0.9 for SD1.5, 0.6 for SDXL.

    Returns:
        lambda per pair, (pairs,), float32, without gradient.

    Raises:
        ValueError: if slack is out of range.

    Source: Diffusion-SDPO (2511.03317), the scale in closed form.
    """
    winner, loser = (g.detach().float().flatten(1) for g in (chosen_gradient, rejected_gradient))
    return sdpo_lambda((winner * winner).sum(1), (winner * loser).sum(1), slack=slack)


def linear(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, floor: float) -> Tensor:
    """Difference of the errors with a linear weight, so that ordered pairs keep a gradient.

        clamp(1/2 + 0.2 beta m, floor, 1 - floor) (err_w - err_l),  m = -2 delta

    Only for image generators. The weight has no gradient.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: > 0, of the margin of whole errors, m.
        floor: the paper's eta, the smallest weight, (0, 0.5).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: for likelihoods, or if an argument is out of range.

    Source: Linear-DPO, Li et al. 2026 (2605.21123).
    """
    check_denoising(policy_logps, "linear")
    check_beta(beta)
    require(0 < floor < 0.5, f"floor must be in (0, 0.5), got {floor}; it is the least weight of a pair")
    weight = (0.5 + 0.2 * beta * -2 * deltas(policy_logps, reference_logps)).clamp(floor, 1 - floor).detach()
    chosen, rejected = denoising_errors(policy_logps)
    return weight * (chosen - rejected)


def mapo(
    policy_logps: LogProbs, *, ratio_weight: float = 0.1, error_scale: float = 0.5, train_timesteps: float = 1000
) -> Tensor:
    """Denoising error of the chosen side with a term that widens its lead. It needs no reference.

        err_w - ratio_weight log s(T [f(s err_w) - f(s err_l)]),  f(x) = x / (e^x - 1)

    Only for image generators.

    Args:
        policy_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        ratio_weight: the paper's beta, >= 0.
        error_scale: s, > 0.
        train_timesteps: T of the noise schedule, > 0.

    Returns:
        Loss per pair, (pairs,). It is err_w + ratio_weight ln 2 if both errors are equal.

    Raises:
        ValueError: for likelihoods, or if an argument is out of range.

    Source: Hong et al. 2024 (2406.06424), with the constants of the authors' code.
    """
    check_denoising(policy_logps, "mapo")
    check_at_least_zero(ratio_weight=ratio_weight)
    require(error_scale > 0, f"error_scale must be above 0, got {error_scale}; the paper uses 0.5")
    require(train_timesteps > 0, f"train_timesteps must be above 0, got {train_timesteps}; mostly 1000")
    chosen, rejected = denoising_errors(policy_logps)
    lead = _over_expm1(error_scale * chosen) - _over_expm1(error_scale * rejected)
    return chosen - ratio_weight * F.logsigmoid(train_timesteps * lead)


def _over_expm1(x: Tensor) -> Tensor:
    """x / (e^x - 1), 1 at 0, any shape; from f(-x) = f(x) + x, with a series near 0, so that nothing overflows."""
    size = x.abs()
    near = size < 1e-3
    away = size.masked_fill(near, 1.0)
    positive = torch.where(near, 1 - size / 2 + size**2 / 12, away * torch.exp(-away) / -torch.expm1(-away))
    return positive + F.relu(-x)


DENOISING: dict[str, Callable[..., Tensor]] = {"sdpo": sdpo, "linear": linear, "mapo": mapo}
