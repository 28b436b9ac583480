"""Objectives of the margin delta = r_w - r_l: what counts is how much more the policy prefers chosen to rejected.

Departures: `ipo` takes the log-ratio a token, as its authors confirmed they did. `discopop`'s product of a sigmoid and
an exponential is computed as one exponential, so that it is finite everywhere. `aot` sorts the pairs it is given: on
several processes each sorts its own, and the quantiles are coarser than the whole batch's.
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


def sigmoid(policy: LogProbs, reference: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on the implicit-reward margin: DPO, or cDPO where labels are noisy.

    policy, reference: nats, (pairs,). beta: 1/nats, > 0. label_smoothing: share of flipped labels, [0, 0.5).
    Returns the loss of each pair, (pairs,); ln 2 where policy equals reference. Raises ValueError outside those ranges.
    Source: Rafailov et al. 2023 (2305.18290) eq. 7; Wallace et al. 2023 (2311.12908) eq. 14; Mitchell 2023 eq. 3.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    return smoothed_logsigmoid_loss(beta * deltas(policy, reference), label_smoothing)


def sigmoid_norm(policy: LogProbs, reference: LogProbs, *, beta: float) -> Tensor:
    """`sigmoid` on log-ratios a token, so that a long completion weighs as much as a short one.

    Returns (pairs,); equals `sigmoid` for images. Raises ValueError where beta <= 0.
    Source: length-normalised DPO of Tulu 3, Lambert et al. 2024 (2411.15124).
    """
    check_beta(beta)
    return -F.logsigmoid(beta * per_token_deltas(policy, reference))


def robust(policy: LogProbs, reference: LogProbs, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """DPO's loss made unbiased under a known share of flipped labels.

    Shapes and ranges as `sigmoid`. Returns (pairs,); may be negative. Raises ValueError outside the ranges.
    Source: Chowdhury et al. 2024 (2403.00409) eq. 12.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    logit = beta * deltas(policy, reference)
    return (-(1 - label_smoothing) * F.logsigmoid(logit) + label_smoothing * F.logsigmoid(-logit)) / (
        1 - 2 * label_smoothing
    )


def hinge(policy: LogProbs, reference: LogProbs, *, beta: float) -> Tensor:
    """Hinge loss on the margin, zero once beta * delta reaches 1.

    Returns (pairs,). Raises ValueError where beta <= 0. Source: SLiC, Zhao et al. 2023 (2305.10425), as in DPO's form.
    """
    check_beta(beta)
    return F.relu(1 - beta * deltas(policy, reference))


def ipo(policy: LogProbs, reference: LogProbs, *, beta: float) -> Tensor:
    """Squared distance of the length-normalised margin from 1 / (2 beta).

    beta: the paper's tau, > 0. The log-ratio of each side is divided by its number of terms (1 for an image).
    Returns (pairs,). Raises ValueError where beta <= 0.
    Source: Azar et al. 2023 (2310.12036) eq. 17; the authors confirmed the per-token mean.
    """
    check_beta(beta)
    return (per_token_deltas(policy, reference) - 1 / (2 * beta)) ** 2


def exo_pair(policy: LogProbs, reference: LogProbs, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """Reverse KL from the policy's preference, Bernoulli(sigmoid(beta * delta)), to the labels' smoothed one.

    label_smoothing: (0, 0.5); 0 would make the divergence infinite. Returns (pairs,), at least 0, and 0 where the policy's
    preference is 1 - label_smoothing; not ln 2 at equality. Raises ValueError outside the ranges.
    Source: EXO, Ji et al. 2024 (2402.00856) eq. 16, epsilon 1e-3; the same divergence is DMPO's (2507.07510), whose
    alpha is `label_smoothing`.
    """
    check_beta(beta)
    require(
        0 < label_smoothing < 0.5,
        f"label_smoothing must be in (0, 0.5) for exo_pair, got {label_smoothing}; the paper uses 1e-3",
    )
    logit = beta * deltas(policy, reference)
    wins = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-label_smoothing))
    return wins + torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(label_smoothing))


def dpop(policy: LogProbs, reference: LogProbs, *, beta: float, penalty: float = 50.0) -> Tensor:
    """DPO-positive: DPO that is charged for a chosen side less likely than under the reference.

    penalty: the paper's lambda, >= 0. Returns (pairs,); equals `sigmoid` where r_w >= 0. Raises ValueError outside the
    ranges. Source: Smaug, Pal et al. 2024 (2402.13228), lambda 5 to 50.
    """
    check_beta(beta)
    check_at_least_zero(penalty=penalty)
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * F.relu(-chosen)))


def discopop(policy: LogProbs, reference: LogProbs, *, beta: float, temperature: float = 0.05) -> Tensor:
    """A loss found by search: logistic for pairs on the wrong side, exponential for those on the right one.

    temperature: the paper's tau, (0, 1]; above 1 the loss would explode on the wrong side. Returns (pairs,);
    (ln 2 + 1) / 2 at equality. Not monotone. Raises ValueError outside the ranges.
    Source: Lu et al. 2024 (2406.08414) eq. 5, tau 0.05.
    """
    check_beta(beta)
    require(0 < temperature <= 1, f"temperature must be in (0, 1], got {temperature}; the paper uses 0.05")
    logit = beta * deltas(policy, reference)
    exponential = torch.exp(F.logsigmoid(logit / temperature) - logit)  # sigmoid(logit / tau) * exp(-logit)
    return torch.sigmoid(-logit / temperature) * -F.logsigmoid(logit) + exponential


def aot(policy: LogProbs, reference: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport: the policy's margins dominate the reference's, quantile by quantile.

    Sorts the pairs given, so it needs a batch of many: the i-th loss is that of the i-th quantile, not of the i-th pair.
    Returns (pairs,); ln 2 where policy equals reference. Raises ValueError outside the ranges of `sigmoid`.
    Source: Melnyk et al. 2024 (2406.05882), paired form.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    ours, theirs = (side.chosen - side.rejected for side in (policy, reference))
    return smoothed_logsigmoid_loss(beta * (ours.sort().values - theirs.sort().values), label_smoothing)


def aot_unpaired(policy: LogProbs, reference: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`aot` without pairing: the chosen log-ratios dominate the rejected ones, quantile by quantile.

    Sorts what is given, as `aot`; chosen and rejected need not belong together. Returns (pairs,).
    Raises ValueError outside the ranges of `sigmoid`.
    Source: Melnyk et al. 2024 (2406.05882), unpaired form.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    chosen, rejected = log_ratios(policy, reference)
    return smoothed_logsigmoid_loss(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def soft(policy: LogProbs, reference: LogProbs, *, beta: float, probability: Tensor) -> Tensor:
    """DPO with soft labels: probability that the chosen side wins, from votes or a judge.

    probability: [0, 1], (pairs,). Returns (pairs,); equals `sigmoid` where probability is 1.
    Raises ValueError where beta <= 0. Source: geometric DPO, Furuta et al. 2024 (2409.06691); cDPO with a label a pair.
    """
    check_beta(beta)
    logit = beta * deltas(policy, reference)
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


def margin(
    policy: LogProbs, reference: LogProbs, *, beta: float, score_margin: Tensor, offset_scale: float = 1.0
) -> Tensor:
    """DPO with an offset: the better the chosen side was judged, the larger the margin asked for.

    score_margin: the judge's difference, chosen minus rejected, (pairs,). offset_scale: the paper's alpha, >= 0.
    Returns (pairs,). Raises ValueError outside the ranges. Source: ODPO, Amini et al. 2024 (2402.10571) eq. 6.
    """
    check_beta(beta)
    check_at_least_zero(offset_scale=offset_scale)
    return -F.logsigmoid(beta * deltas(policy, reference) - offset_scale * score_margin)


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
"""Those of the difference alone, in which the partition function of an f-divergence cancels."""
