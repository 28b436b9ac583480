"""Objectives of delta = r_w - r_l, the difference of the log-ratios of chosen and rejected.

In the formulas s is the logistic function, e the label smoothing, w chosen and l rejected.

Departures from the papers: `ipo` uses the log-ratio per token, as its authors confirmed. `discopop` computes the product of
a sigmoid and an exponential as one exponential, which is finite everywhere. `aot` sorts the pairs of one process, so with
several processes its quantiles are coarser than those of the whole batch.
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
    """Logistic loss on the reward margin: DPO, or conservative DPO with label smoothing.

        -(1 - e) log s(beta delta) - e log s(-beta delta)

    It raises the log-ratio of chosen over rejected, most for pairs that the policy orders wrongly.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, [0, 0.5).

    Returns:
        Loss per pair, (pairs,). It is ln 2 if policy and reference agree.

    Raises:
        ValueError: if an argument is out of range.

    Source: Rafailov et al. 2023 (2305.18290), eq. 7; Wallace et al. 2023 (2311.12908), eq. 14; Mitchell 2023, eq. 3.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    return smoothed_logsigmoid_loss(beta * deltas(policy_logps, reference_logps), label_smoothing)


def sigmoid_norm(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """`sigmoid` on log-ratios per token, so that long completions do not dominate.

        -log s(beta (r_w / tokens_w - r_l / tokens_l))

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,). For images it equals `sigmoid`.

    Raises:
        ValueError: if beta is not above 0.

    Source: length-normalised DPO of Tulu 3, Lambert et al. 2024 (2411.15124).
    """
    check_beta(beta)
    return -F.logsigmoid(beta * per_token_deltas(policy_logps, reference_logps))


def robust(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """DPO's loss, made unbiased for a known fraction of flipped labels.

        [-(1 - e) log s(beta delta) + e log s(-beta delta)] / (1 - 2e)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, [0, 0.5).

    Returns:
        Loss per pair, (pairs,). It can be negative.

    Raises:
        ValueError: if an argument is out of range.

    Source: Chowdhury et al. 2024 (2403.00409), eq. 12.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    logit = beta * deltas(policy_logps, reference_logps)
    return (-(1 - label_smoothing) * F.logsigmoid(logit) + label_smoothing * F.logsigmoid(-logit)) / (
        1 - 2 * label_smoothing
    )


def hinge(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Hinge loss on the reward margin. It is zero once the margin reaches 1.

        max(0, 1 - beta delta)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is not above 0.

    Source: SLiC, Zhao et al. 2023 (2305.10425), in DPO's form.
    """
    check_beta(beta)
    return F.relu(1 - beta * deltas(policy_logps, reference_logps))


def ipo(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float) -> Tensor:
    """Squared distance of the length-normalised delta from a target.

        (r_w / tokens_w - r_l / tokens_l - 1 / (2 beta))^2

    The target bounds the margin, so that certain labels do not push it to infinity.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: the paper's tau, 1/nats, > 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is not above 0.

    Source: Azar et al. 2023 (2310.12036), eq. 17. The authors confirmed the mean per token.
    """
    check_beta(beta)
    return (per_token_deltas(policy_logps, reference_logps) - 1 / (2 * beta)) ** 2


def exo_pair(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 1e-3
) -> Tensor:
    """Reverse KL from the policy's preference to the smoothed label.

        KL(Bernoulli(s(beta delta)), Bernoulli(1 - e))

    It is mode-seeking: pairs far on the wrong side have small gradients. DMPO (2507.07510) uses the same divergence.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: (0, 0.5). At 0 the divergence is infinite.

    Returns:
        Loss per pair, (pairs,), >= 0. It is 0 if s(beta delta) is 1 - label_smoothing.

    Raises:
        ValueError: if an argument is out of range.

    Source: EXO, Ji et al. 2024 (2402.00856), eq. 16, with epsilon 1e-3.
    """
    check_beta(beta)
    require(
        0 < label_smoothing < 0.5,
        f"label_smoothing must be in (0, 0.5) for exo_pair, got {label_smoothing}; the paper uses 1e-3",
    )
    logit = beta * deltas(policy_logps, reference_logps)
    wins = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-label_smoothing))
    return wins + torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(label_smoothing))


def dpop(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, penalty: float = 50.0) -> Tensor:
    """DPO with a penalty if the chosen side becomes less likely than under the reference.

        -log s(beta (delta - penalty max(0, -r_w)))

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        penalty: the paper's lambda, >= 0.

    Returns:
        Loss per pair, (pairs,). It equals `sigmoid` if r_w >= 0.

    Raises:
        ValueError: if an argument is out of range.

    Source: Smaug, Pal et al. 2024 (2402.13228), with lambda 5 to 50.
    """
    check_beta(beta)
    check_at_least_zero(penalty=penalty)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * F.relu(-chosen)))


def discopop(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, temperature: float = 0.05) -> Tensor:
    """Loss found by search: logistic for wrongly ordered pairs, exponential for the others.

        (1 - m) (-log s(beta delta)) + m exp(-beta delta),  m = s(beta delta / temperature)

    It is not monotone: around delta 0 its gradient has the wrong sign.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        temperature: the paper's tau, (0, 1]. Above 1 the loss explodes on the wrong side.

    Returns:
        Loss per pair, (pairs,). It is (ln 2 + 1) / 2 if policy and reference agree.

    Raises:
        ValueError: if an argument is out of range.

    Source: Lu et al. 2024 (2406.08414), eq. 5, with tau 0.05.
    """
    check_beta(beta)
    require(0 < temperature <= 1, f"temperature must be in (0, 1], got {temperature}; the paper uses 0.05")
    logit = beta * deltas(policy_logps, reference_logps)
    exponential = torch.exp(F.logsigmoid(logit / temperature) - logit)  # sigmoid(logit / tau) * exp(-logit)
    return torch.sigmoid(-logit / temperature) * -F.logsigmoid(logit) + exponential


def aot(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport: the policy's margins dominate the reference's, by quantile.

        sigmoid of sorted (policy_w - policy_l) - sorted (reference_w - reference_l)

    It sorts the given pairs and needs a large batch.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, [0, 0.5).

    Returns:
        Loss per quantile, (pairs,), not per pair. It is ln 2 if policy and reference agree.

    Raises:
        ValueError: if an argument is out of range.

    Source: Melnyk et al. 2024 (2406.05882), paired form.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    ours, theirs = (side.chosen - side.rejected for side in (policy_logps, reference_logps))
    return smoothed_logsigmoid_loss(beta * (ours.sort().values - theirs.sort().values), label_smoothing)


def aot_unpaired(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """`aot` without pairing: chosen log-ratios dominate rejected ones, by quantile.

        sigmoid of sorted r_w - sorted r_l

    Chosen and rejected need not belong to the same prompt. It needs a large batch.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, [0, 0.5).

    Returns:
        Loss per quantile, (pairs,), not per pair.

    Raises:
        ValueError: if an argument is out of range.

    Source: Melnyk et al. 2024 (2406.05882), unpaired form.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return smoothed_logsigmoid_loss(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def soft(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, probability: Tensor) -> Tensor:
    """DPO with soft labels, from votes or a judge.

        -p log s(beta delta) - (1 - p) log s(-beta delta)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        probability: p, that the chosen side is the better one, [0, 1], (pairs,).

    Returns:
        Loss per pair, (pairs,). It equals `sigmoid` if the probability is 1.

    Raises:
        ValueError: if beta is not above 0.

    Source: geometric DPO, Furuta et al. 2024 (2409.06691); conservative DPO with one label per pair.
    """
    check_beta(beta)
    logit = beta * deltas(policy_logps, reference_logps)
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


def margin(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, score_margin: Tensor, offset_scale: float = 1.0
) -> Tensor:
    """DPO with an offset: the larger the judge's score gap, the larger the required margin.

        -log s(beta delta - offset_scale score_margin)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        score_margin: the judge's score of chosen minus rejected, (pairs,).
        offset_scale: the paper's alpha, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if an argument is out of range.

    Source: ODPO, Amini et al. 2024 (2402.10571), eq. 6.
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
    "aot": aot,
    "aot_unpaired": aot_unpaired,
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
"""Objectives of the difference only, in which the partition function of an f-divergence cancels."""
