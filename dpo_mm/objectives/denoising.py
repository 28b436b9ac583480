"""Objectives made for image generators.

Departures: `sdpo` takes its scale a pair; the authors' code takes it a micro-batch, so that its result depends on the
batch size. `linear`'s margin is the paper's, of whole errors, twice the size of delta.
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


def sdpo(policy: LogProbs, reference: LogProbs, *, beta: float, rejected_gradient_scale: Tensor) -> Tensor:
    """`sigmoid` whose step does not raise the chosen side's error: the rejected side's gradient alone is scaled.

    rejected_gradient_scale: lambda of each pair, [0, 1], (pairs,), no gradient (see `sdpo_lambda_image`). The value is that of `sigmoid`.
    Returns (pairs,). Raises ValueError where beta <= 0. Source: Diffusion-SDPO, Fu et al. 2025 (2511.03317).
    """
    check_beta(beta)
    chosen, rejected = log_ratios(policy, reference)
    rejected = rejected.detach() + rejected_gradient_scale * (rejected - rejected.detach())
    return -F.logsigmoid(beta * (chosen - rejected))


def sdpo_lambda_image(chosen_gradient: Tensor, rejected_gradient: Tensor, *, slack: float) -> Tensor:
    """lambda of each pair: the largest share of the rejected side's gradient that keeps the chosen error from rising.

    chosen_gradient, rejected_gradient: of each side's error with respect to the network's output, (pairs, ...); for a
    denoiser prediction - target will do, a common factor cancels. slack: the paper's mu, [0, 1); 0.9 for SD1.5, 0.6
    for SDXL. Returns clip((1 - mu) |g_w|^2 / <g_l, g_w>, 0, 1), 1 where the inner product is not positive; (pairs,),
    float32, no gradient. Raises ValueError outside the range. Source: Diffusion-SDPO (2511.03317), the scale in closed form.
    """
    winner, loser = (g.detach().float().flatten(1) for g in (chosen_gradient, rejected_gradient))
    return sdpo_lambda((winner * winner).sum(1), (winner * loser).sum(1), slack=slack)


def linear(policy: LogProbs, reference: LogProbs, *, beta: float, floor: float) -> Tensor:
    """Difference of the errors, weighted by a line instead of DPO's sigmoid, so that won pairs go on teaching.

    beta: > 0, of the whole error margin m = (err_w - ref_w) - (err_l - ref_l) = -2 delta. floor: the paper's eta, the
    least weight, (0, 0.5). Returns (pairs,); its weight has no gradient. Images alone: raises ValueError for a
    likelihood, and outside the ranges. Source: Linear-DPO, Li et al. 2026 (2605.21123).
    """
    check_denoising(policy, "linear")
    check_beta(beta)
    require(0 < floor < 0.5, f"floor must be in (0, 0.5), got {floor}; it is the least weight of a pair")
    weight = (0.5 + 0.2 * beta * -2 * deltas(policy, reference)).clamp(floor, 1 - floor).detach()
    chosen, rejected = denoising_errors(policy)
    return weight * (chosen - rejected)


def mapo(
    policy: LogProbs, *, ratio_weight: float = 0.1, error_scale: float = 0.5, train_timesteps: float = 1000
) -> Tensor:
    """Denoising error of the chosen side with a term that widens its lead; no reference. Images alone.

    ratio_weight: the paper's beta, >= 0. error_scale: s, > 0. train_timesteps: T of the noise schedule, > 0.
    Returns (pairs,); err_w + ratio_weight * ln 2 where both errors are alike. Raises ValueError for a likelihood, and
    outside the ranges. Source: Hong et al. 2024 (2406.06424), as in the authors' code (0.1, 0.5, 1000).
    """
    check_denoising(policy, "mapo")
    check_at_least_zero(ratio_weight=ratio_weight)
    require(error_scale > 0, f"error_scale must be above 0, got {error_scale}; the paper uses 0.5")
    require(train_timesteps > 0, f"train_timesteps must be above 0, got {train_timesteps}; mostly 1000")
    chosen, rejected = denoising_errors(policy)
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
