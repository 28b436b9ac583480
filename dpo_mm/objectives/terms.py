"""Terms that are added to an objective with a weight. Each is a preference loss by itself.

The terms for vision-language models need log-ratios of a further forward pass (another image). They come with the batch.

Symbols, for one pair: w is chosen and l is rejected, r = log p_policy - log p_reference is the log-ratio,
delta = r_w - r_l and s(x) = 1 / (1 + e^-x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, check_at_least_zero, check_beta, deltas, log_ratios


def anchor(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, anchor_shift: float = 0.0) -> Tensor:
    """Logistic loss on the log-ratio of the chosen side (mDPO's anchor).

        -log s(beta * r_w - d),  d = anchor_shift

    It keeps the chosen side at least as likely as under the reference.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        anchor_shift: the paper's delta, in units of beta * nats.

    Returns:
        Loss per pair, (pairs,). It is ln 2 if policy and reference agree and anchor_shift is 0.

    Raises:
        ValueError: if beta is out of range.

    Source: mDPO, Wang et al. 2024 (2406.11839), delta 0.
    """
    check_beta(beta)
    return -F.logsigmoid(beta * log_ratios(policy_logps, reference_logps)[0] - anchor_shift)


def image_conditional(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, corrupted_ratio: Tensor
) -> Tensor:
    """Logistic loss on the chosen log-ratio given the image against that given a corrupted image (mDPO).

        -log s(beta * (r_w - r_w given a corrupted image))

    The chosen text should become likelier because of its image, so the model cannot ignore the image. VLMs only.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        corrupted_ratio: r_w given the corrupted image, nats, with gradient, (pairs,).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is out of range.

    Source: mDPO, Wang et al. 2024 (2406.11839).
    """
    check_beta(beta)
    return -F.logsigmoid(beta * (log_ratios(policy_logps, reference_logps)[0] - corrupted_ratio))


def symmetric_image(
    policy_logps: LogProbs,
    reference_logps: LogProbs,
    *,
    beta: float,
    other_ratio: Tensor,
    crossed_ratio: Tensor,
    contrast_weight: float = 0.5,
    closeness_weight: float = 1e-4,
) -> Tensor:
    """Contrast of two similar images, each with its own text, in both directions (SymMPO).

        c * (l(m_1) + l(m_2)) + l(r_11) + l(r_22) + k * (m_1 - m_2)^2,  l(x) = -log s(beta * x)

    Here r_ij is the log-ratio of text j given image i, m_1 = r_11 - r_12 and m_2 = r_22 - r_21, c = contrast_weight and
    k = closeness_weight. Each image should prefer its own text, by about the same margin. VLMs only.

    Args:
        policy_logps: log-probs given the first image, nats, (pairs,) each: chosen is its own text and rejected the
            other image's text.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        other_ratio: r_22, the log-ratio of the second image's own text, nats, with gradient, (pairs,).
        crossed_ratio: r_21, the log-ratio of the first image's text given the second image, in the same way.
        contrast_weight: the paper's lambda, >= 0.
        closeness_weight: weight of the squared difference of both margins, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta or a weight is out of range.

    Source: Liu et al. 2025 (2506.11712), lambda 0.5, closeness weight 1e-4.
    """
    check_beta(beta)
    check_at_least_zero(contrast_weight=contrast_weight, closeness_weight=closeness_weight)
    own_ratio, swapped_ratio = log_ratios(policy_logps, reference_logps)
    first, second = own_ratio - swapped_ratio, other_ratio - crossed_ratio
    contrast = -F.logsigmoid(beta * first) - F.logsigmoid(beta * second)
    anchors = -F.logsigmoid(beta * own_ratio) - F.logsigmoid(beta * other_ratio)
    return contrast_weight * contrast + anchors + closeness_weight * (first - second) ** 2


def tdpo(
    policy_logps: LogProbs,
    reference_logps: LogProbs,
    *,
    beta: float,
    kl_chosen: Tensor,
    kl_rejected: Tensor,
    kl_weight: float = 0.5,
) -> Tensor:
    """Logistic loss with a penalty on the token-level KL of the rejected side (TDPO2).

        -log s(beta * delta - alpha * beta * (KL_l - KL_w)),  alpha = kl_weight

    The policy's token distributions on the rejected side should stay as close to the reference as on the chosen side.
    Text only.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        kl_chosen: KL(reference || policy) summed over the tokens of chosen, nats, (pairs,). Its gradient is not used.
        kl_rejected: the same of rejected, with gradient.
        kl_weight: the paper's alpha, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta or kl_weight is out of range.

    Source: Zeng et al. 2024 (2404.11999), TDPO2, alpha 0.5.
    """
    check_beta(beta)
    check_at_least_zero(kl_weight=kl_weight)
    return -F.logsigmoid(
        beta * (deltas(policy_logps, reference_logps) - kl_weight * (kl_rejected - kl_chosen.detach()))
    )


TERMS: dict[str, Callable[..., Tensor]] = {
    "anchor": anchor,
    "image_conditional": image_conditional,
    "symmetric_image": symmetric_image,
    "tdpo": tdpo,
}
