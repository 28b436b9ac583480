"""Objectives made for image generators.

Symbols, for one pair: w is chosen and l is rejected. err is the denoising error, log p = -err / 2 its surrogate
log-prob, r = log p_policy - log p_reference the log-ratio and delta = r_w - r_l. s(x) = 1 / (1 + e^-x).

Departures from the papers:

- `sdpo` takes its scale per pair. The authors' code takes it per micro-batch, so that its result depends on the batch
  size.
- The margin of `linear` is the paper's, of whole errors. It is twice the size of delta.
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
    """Logistic loss that scales down the gradient of the rejected side (Diffusion-SDPO).

        -log s(beta * delta), with the gradient of r_l multiplied by lambda = rejected_gradient_scale

    The scale is chosen so that a step does not raise the error of the chosen side.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        rejected_gradient_scale: lambda of each pair, in [0, 1], (pairs,), without gradient. See `sdpo_lambda_image`.

    Returns:
        Loss per pair, (pairs,). Its value is that of `sigmoid`.

    Raises:
        ValueError: if beta is out of range.

    Source: Fu et al. 2025 (2511.03317).
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    rejected = rejected.detach() + rejected_gradient_scale * (rejected - rejected.detach())
    return -F.logsigmoid(beta * (chosen - rejected))


def sdpo_lambda_image(chosen_gradient: Tensor, rejected_gradient: Tensor, *, slack: float) -> Tensor:
    """Scale of `sdpo` for images: the largest one that keeps the chosen error from rising.

        lambda = clip((1 - mu) |g_w|^2 / <g_l, g_w>, 0, 1), or 1 if the inner product is not positive,  mu = slack

    Args:
        chosen_gradient: g_w, gradient of the chosen side's error at the network's output, (pairs, ...). For a denoiser,
            prediction - target is enough, because a common factor cancels.
        rejected_gradient: g_l, the same of the rejected side.
        slack: the paper's mu, in [0, 1). It uses 0.9 for SD1.5 and 0.6 for SDXL.

    Returns:
        Scale per pair, (pairs,), float32, without gradient.

    Raises:
        ValueError: if slack is out of range.

    Source: Diffusion-SDPO, Fu et al. 2025 (2511.03317), the scale in closed form.
    """
    winner, loser = (gradient.detach().float().flatten(1) for gradient in (chosen_gradient, rejected_gradient))
    return sdpo_lambda((winner * winner).sum(1), (winner * loser).sum(1), slack=slack)


def linear(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, floor: float) -> Tensor:
    """Difference of the denoising errors, weighted by a clipped line instead of DPO's sigmoid (Linear-DPO).

        clip(1/2 + 0.2 beta m, eta, 1 - eta) * (err_w - err_l),  m = -2 delta,  eta = floor

    Pairs that are already ordered correctly keep a gradient.

    Args:
        policy_logps: surrogate log-probs of chosen and rejected under the policy, nats, (pairs,) each. Images only.
        reference_logps: the same under the reference.
        beta: factor of the error margin m = (err_w - ref_w) - (err_l - ref_l), > 0.
        floor: the paper's eta, the smallest weight of a pair, in (0, 0.5).

    Returns:
        Loss per pair, (pairs,). The weight has no gradient.

    Raises:
        ValueError: if the log-probs are likelihoods, or beta or floor is out of range.

    Source: Li et al. 2026 (2605.21123).
    """
    check_denoising(policy_logps, "linear")
    check_beta(beta)
    require(0 < floor < 0.5, f"floor must be in (0, 0.5), got {floor}. It is the smallest weight of a pair")
    weight = (0.5 + 0.2 * beta * -2 * deltas(policy_logps, reference_logps)).clamp(floor, 1 - floor).detach()
    chosen, rejected = denoising_errors(policy_logps)
    return weight * (chosen - rejected)


def mapo(
    policy_logps: LogProbs, *, ratio_weight: float = 0.1, error_scale: float = 0.5, train_timesteps: float = 1000
) -> Tensor:
    """Denoising error of the chosen side plus a term that widens its lead, without a reference (MaPO).

        err_w - b log s(T * (f(c * err_w) - f(c * err_l))),  f(x) = x / (e^x - 1)

    Here b = ratio_weight, c = error_scale and T = train_timesteps. The first term is plain fine-tuning on the chosen
    image.

    Args:
        policy_logps: surrogate log-probs of chosen and rejected under the policy, nats, (pairs,) each. Images only.
        ratio_weight: b, the paper's beta, >= 0.
        error_scale: c, > 0.
        train_timesteps: T, number of timesteps of the noise schedule, > 0.

    Returns:
        Loss per pair, (pairs,). It is err_w + ratio_weight * ln 2 if both errors are equal.

    Raises:
        ValueError: if the log-probs are likelihoods, or a setting is out of range.

    Source: Hong et al. 2024 (2406.06424), as in the authors' code (0.1, 0.5, 1000).
    """
    check_denoising(policy_logps, "mapo")
    check_at_least_zero(ratio_weight=ratio_weight)
    require(error_scale > 0, f"error_scale must be above 0, got {error_scale}. The paper uses 0.5")
    require(train_timesteps > 0, f"train_timesteps must be above 0, got {train_timesteps}. It is 1000 for most models")
    chosen, rejected = denoising_errors(policy_logps)
    lead = _over_expm1(error_scale * chosen) - _over_expm1(error_scale * rejected)
    return chosen - ratio_weight * F.logsigmoid(train_timesteps * lead)


def _over_expm1(x: Tensor) -> Tensor:
    """x / (e^x - 1), and 1 at 0, for any shape, without overflow."""
    # f(-x) = f(x) + x reduces it to x >= 0, where a series replaces 0 / 0 near 0.
    magnitude = x.abs()
    is_small = magnitude < 1e-3
    large = magnitude.masked_fill(is_small, 1.0)
    series = 1 - magnitude / 2 + magnitude**2 / 12
    positive = torch.where(is_small, series, large * torch.exp(-large) / -torch.expm1(-large))
    return positive + F.relu(-x)


DENOISING: dict[str, Callable[..., Tensor]] = {"sdpo": sdpo, "linear": linear, "mapo": mapo}
