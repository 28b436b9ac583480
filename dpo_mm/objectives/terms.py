"""Terms that are added to an objective by weight. Each is a preference loss.

Terms for vision-language models need log-ratios of another forward, with another image, which come with the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, check_at_least_zero, check_beta, deltas, log_ratios


def anchor(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, anchor_shift: float = 0.0) -> Tensor:
    """Term that keeps the chosen side at least as likely as under the reference.

        -log s(beta r_w - anchor_shift)

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        anchor_shift: the paper's delta, in units of beta times nats.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is not above 0.

    Source: mDPO, Wang et al. 2024 (2406.11839), with delta 0.
    """
    check_beta(beta)
    return -F.logsigmoid(beta * log_ratios(policy_logps, reference_logps)[0] - anchor_shift)


def image_conditional(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, corrupted_ratio: Tensor
) -> Tensor:
    """Term that makes the chosen text likelier with its image than with a corrupted one.

        -log s(beta (r_w - corrupted_ratio))

    Only for vision-language models, against responses that ignore the image.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        corrupted_ratio: r_w given the corrupted image, nats, with gradient, (pairs,).

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if beta is not above 0.

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
    """Contrast of two similar images, each with its own text, in both directions.

    Each image prefers its own text, and by about the same margin. Only for vision-language models.

    Args:
        policy_logps, reference_logps: of the first image, with its own text as chosen and the other image's as rejected.
        beta: inverse temperature, 1/nats, > 0.
        other_ratio, crossed_ratio: r of the second image's own text and of the first's text, both given the second image,
            nats, with gradient, (pairs,).
        contrast_weight, closeness_weight: >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if an argument is out of range.

    Source: SymMPO, Liu et al. 2025 (2506.11712), with lambda 0.5 and 1e-4.
    """
    check_beta(beta)
    check_at_least_zero(contrast_weight=contrast_weight, closeness_weight=closeness_weight)
    own, swapped = log_ratios(policy_logps, reference_logps)
    first, second = own - swapped, other_ratio - crossed_ratio
    contrast = -F.logsigmoid(beta * first) - F.logsigmoid(beta * second)
    anchors = -F.logsigmoid(beta * own) - F.logsigmoid(beta * other_ratio)
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
    """DPO with the token-level KL of the rejected side kept near the chosen side's (TDPO2).

        -log s(beta delta - beta kl_weight (kl_rejected - kl_chosen))

    Only for text.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.
        beta: inverse temperature, 1/nats, > 0.
        kl_chosen, kl_rejected: KL(reference || policy) summed over the completion's tokens, nats, (pairs,). The chosen one
            is used without gradient.
        kl_weight: the paper's alpha, >= 0.

    Returns:
        Loss per pair, (pairs,).

    Raises:
        ValueError: if an argument is out of range.

    Source: Zeng et al. 2024 (2404.11999), TDPO2, with alpha 0.5.
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
