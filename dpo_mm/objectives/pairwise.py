"""Objectives of the difference delta: they compare how much the policy prefers chosen over rejected.

Symbols, for one pair: w is chosen and l is rejected. r = log p_policy - log p_reference is the log-ratio, beta * r the
implicit reward, delta = r_w - r_l and beta * delta the reward margin. A bar is the mean per token, and an image has one
token. s(x) = 1 / (1 + e^-x).

Departures from the papers:

- `ipo` takes the log-ratio per token. The authors confirmed that they did the same.
- `discopop` computes its product of a sigmoid and an exponential as one exponential, so that it is finite everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import (
    LogProbs,
    check_at_least_zero,
    check_beta,
    check_smoothing,
    deltas,
    log_ratios,
    per_token_deltas,
    require,
    smoothed_logsigmoid_loss,
)


def sigmoid(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on the reward margin (DPO, or conservative DPO with label smoothing).

        -(1 - e) log s(beta * delta) - e log s(-beta * delta),  e = label_smoothing

    The loss raises the chosen log-ratio over the rejected one, and pairs that are ordered wrongly pull hardest.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, in [0, 0.5).

    Returns:
        Loss per pair, (pairs,). It is ln 2 if policy and reference agree.

    Raises:
        ValueError: if beta or label_smoothing is out of range.

    Source: Rafailov et al. 2023 (2305.18290), eq. 7; Wallace et al. 2023 (2311.12908), eq. 14; Mitchell 2023, eq. 3.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    return smoothed_logsigmoid_loss(beta * deltas(policy_logps, reference_logps), label_smoothing)


def sigmoid_norm(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Logistic loss on log-ratios per token (length-normalised DPO).

        -log s(beta * delta_bar),  delta_bar = r_w / tokens_w - r_l / tokens_l

    A long completion counts as much as a short one.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,). It equals `sigmoid` for images.

    Raises:
        ValueError: if beta is out of range.

    Source: Tulu 3, Lambert et al. 2024 (2411.15124), length-normalised DPO.
    """
    check_beta(beta)
    return -F.logsigmoid(beta * per_token_deltas(policy_logps, reference_logps))


def robust(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Logistic loss that is unbiased if a known fraction of labels is flipped (robust DPO).

        [-(1 - e) log s(beta * delta) + e log s(-beta * delta)] / (1 - 2 e),  e = label_smoothing

    In expectation over the flips, it equals the loss on clean labels.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels that are flipped, in [0, 0.5).

    Returns:
        Loss per pair, (pairs,). It may be negative.

    Raises:
        ValueError: if beta or label_smoothing is out of range.

    Source: Chowdhury et al. 2024 (2403.00409), eq. 12.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    logit = beta * deltas(policy_logps, reference_logps)
    return (-(1 - label_smoothing) * F.logsigmoid(logit) + label_smoothing * F.logsigmoid(-logit)) / (
        1 - 2 * label_smoothing
    )


def hinge(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Hinge loss on the reward margin.

        max(0, 1 - beta * delta)

    A pair has no gradient once its reward margin reaches 1.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is out of range.

    Source: SLiC, Zhao et al. 2023 (2305.10425), on DPO's implicit rewards.
    """
    check_beta(beta)
    return F.relu(1 - beta * deltas(policy_logps, reference_logps))


def ipo(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Squared distance of the length-normalised delta from a target (IPO).

        (delta_bar - 1 / (2 beta))^2,  delta_bar = r_w / tokens_w - r_l / tokens_l

    The target is a margin to reach and not to exceed, so certain labels do not push the policy ever further.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: the paper's tau, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is out of range.

    Source: Azar et al. 2023 (2310.12036), eq. 17. The authors confirmed the mean per token.
    """
    check_beta(beta)
    return (per_token_deltas(policy_logps, reference_logps) - 1 / (2 * beta)) ** 2


def exo_pair(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 1e-3
) -> Tensor:
    """Reverse KL divergence from the policy's preference to the smoothed label (EXO, and DMPO).

        KL(Bernoulli(s(beta * delta)) || Bernoulli(1 - e)),  e = label_smoothing

    Reverse KL is mode-seeking: pairs far on the wrong side pull little.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: EXO's epsilon, DMPO's alpha, in (0, 0.5). The divergence would be infinite at 0.

    Returns:
        Loss per pair, (pairs,), at least 0. It is 0 if the policy's preference is 1 - label_smoothing, and not ln 2 if
        policy and reference agree.

    Raises:
        ValueError: if beta or label_smoothing is out of range.

    Source: EXO, Ji et al. 2024 (2402.00856), eq. 16, epsilon 1e-3; DMPO, Li 2025 (2507.07510), the same divergence.
    """
    check_beta(beta)
    require(
        0 < label_smoothing < 0.5,
        f"label_smoothing must be in (0, 0.5) for exo_pair, got {label_smoothing}. The paper uses 1e-3",
    )
    logit = beta * deltas(policy_logps, reference_logps)
    chosen_part = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-label_smoothing))
    return chosen_part + torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(label_smoothing))


def dpop(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, penalty: float = 50.0) -> Tensor:
    """Logistic loss that penalises a chosen side less likely than under the reference (DPO-positive).

        -log s(beta * (delta - lambda * max(0, -r_w))),  lambda = penalty

    A chosen side that falls below the reference costs lambda times its fall, so the margin does not grow at its expense.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        penalty: the paper's lambda, >= 0.

    Returns:
        Loss per pair, (pairs,). It equals `sigmoid` if r_w >= 0.

    Raises:
        ValueError: if beta or penalty is out of range.

    Source: Smaug, Pal et al. 2024 (2402.13228), lambda 5 to 50.
    """
    check_beta(beta)
    check_at_least_zero(penalty=penalty)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * F.relu(-chosen)))


def discopop(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, temperature: float = 0.05) -> Tensor:
    """Blend of a logistic and an exponential loss that was found by program search (DiscoPOP).

        (1 - m) * (-log s(beta * delta)) + m * exp(-beta * delta),  m = s(beta * delta / tau),  tau = temperature

    Pairs on the wrong side get the logistic loss, pairs on the right side the exponential one.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        temperature: the paper's tau, in (0, 1]. Above 1 the loss would explode on the wrong side.

    Returns:
        Loss per pair, (pairs,). It is (ln 2 + 1) / 2 if policy and reference agree, and not monotone in delta.

    Raises:
        ValueError: if beta or temperature is out of range.

    Source: Lu et al. 2024 (2406.08414), eq. 5, tau 0.05.
    """
    check_beta(beta)
    require(0 < temperature <= 1, f"temperature must be in (0, 1], got {temperature}. The paper uses 0.05")
    logit = beta * deltas(policy_logps, reference_logps)
    exponential = torch.exp(F.logsigmoid(logit / temperature) - logit)  # s(logit / tau) * exp(-logit)
    return torch.sigmoid(-logit / temperature) * -F.logsigmoid(logit) + exponential


def soft(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, probability: Tensor) -> Tensor:
    """Logistic loss with a soft label per pair (geometric DPO).

        -p log s(beta * delta) - (1 - p) log s(-beta * delta),  p = probability

    The margin stops growing when the policy's preference equals the label, so a contested pair pulls little.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        probability: probability that chosen wins, from votes or a judge, in [0, 1], (pairs,).

    Returns:
        Loss per pair, (pairs,). It equals `sigmoid` if probability is 1.

    Raises:
        ValueError: if beta is out of range.

    Source: Furuta et al. 2024 (2409.06691). It is conservative DPO with one smoothing per pair.
    """
    check_beta(beta)
    logit = beta * deltas(policy_logps, reference_logps)
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


def margin(
    policy_logps: LogProbs,
    reference_logps: LogProbs,
    *,
    beta: float,
    score_margin: Tensor,
    offset_scale: float = 1.0,
) -> Tensor:
    """Logistic loss with an offset that grows with the judge's score gap (ODPO).

        -log s(beta * delta - alpha * m),  m = score_margin,  alpha = offset_scale

    The better chosen was scored than rejected, the larger is the reward margin that the loss requires.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        score_margin: a judge's score of chosen minus its score of rejected, (pairs,).
        offset_scale: the paper's alpha, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta or offset_scale is out of range.

    Source: Amini et al. 2024 (2402.10571), eq. 6.
    """
    check_beta(beta)
    check_at_least_zero(offset_scale=offset_scale)
    return -F.logsigmoid(beta * deltas(policy_logps, reference_logps) - offset_scale * score_margin)


PAIRWISE: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "dmpo": exo_pair,
    "dpop": dpop,
    "discopop": discopop,
    "soft": soft,
    "margin": margin,
}

SUPPORTS_DIVERGENCE = (
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "dmpo",
    "discopop",
    "soft",
    "margin",
)
"""Objectives that depend on delta only, so that the partition function of an f-divergence cancels."""
