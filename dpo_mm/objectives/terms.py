"""Terms that are added to an objective by weight; each is a preference loss by itself.

Those on vision-language models need log-ratios of a further forward (another image), which come with the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, check_at_least_zero, check_beta, deltas, log_ratios


def anchor(policy: LogProbs, reference: LogProbs, *, beta: float, anchor_shift: float = 0.0) -> Tensor:
    """Keeps the chosen side at least as likely as under the reference: -log sigmoid(beta * r_w - shift).

    anchor_shift: the paper's delta, in units of beta * nats. Returns (pairs,). Raises ValueError where beta <= 0.
    Source: mDPO, Wang et al. 2024 (2406.11839), delta 0.
    """
    check_beta(beta)
    return -F.logsigmoid(beta * log_ratios(policy, reference)[0] - anchor_shift)


def image_conditional(policy: LogProbs, reference: LogProbs, *, beta: float, corrupted_ratio: Tensor) -> Tensor:
    """The chosen text is likelier with its image than with a corrupted one, so that the image isn't ignored.

    corrupted_ratio: r_w given the corrupted image, nats, with gradient, (pairs,). Returns (pairs,). VLMs alone.
    Raises ValueError where beta <= 0. Source: mDPO, Wang et al. 2024 (2406.11839).
    """
    check_beta(beta)
    return -F.logsigmoid(beta * (log_ratios(policy, reference)[0] - corrupted_ratio))


def symmetric_image(
    policy: LogProbs,
    reference: LogProbs,
    *,
    beta: float,
    other_ratio: Tensor,
    crossed_ratio: Tensor,
    contrast_weight: float = 0.5,
    closeness_weight: float = 1e-4,
) -> Tensor:
    """Two like images, each with its own text: each image prefers its text, and by about the same margin.

    policy, reference: of the first image, its own text as chosen, the other image's text as rejected, (pairs,).
    other_ratio, crossed_ratio: r of the second image's own text, and of the first's text, both given the second image,
    nats, with gradient, (pairs,). contrast_weight, closeness_weight: >= 0. Returns (pairs,). VLMs alone.
    Raises ValueError outside the ranges. Source: SymMPO, Liu et al. 2025 (2506.11712), lambda 0.5, 1e-4.
    """
    check_beta(beta)
    check_at_least_zero(contrast_weight=contrast_weight, closeness_weight=closeness_weight)
    own, swapped = log_ratios(policy, reference)
    first, second = own - swapped, other_ratio - crossed_ratio
    contrast = -F.logsigmoid(beta * first) - F.logsigmoid(beta * second)
    anchors = -F.logsigmoid(beta * own) - F.logsigmoid(beta * other_ratio)
    return contrast_weight * contrast + anchors + closeness_weight * (first - second) ** 2


def tdpo(
    policy: LogProbs,
    reference: LogProbs,
    *,
    beta: float,
    kl_chosen: Tensor,
    kl_rejected: Tensor,
    kl_weight: float = 0.5,
) -> Tensor:
    """DPO with the token-level KL of the rejected side held near the chosen side's (TDPO2).

    kl_chosen, kl_rejected: KL(reference || policy) summed over the completion's tokens, nats, (pairs,); the chosen one
    is used without gradient. kl_weight: the paper's alpha, >= 0. Returns (pairs,). Text alone.
    Raises ValueError outside the ranges. Source: Zeng et al. 2024 (2404.11999), TDPO2, alpha 0.5.
    """
    check_beta(beta)
    check_at_least_zero(kl_weight=kl_weight)
    return -F.logsigmoid(beta * (deltas(policy, reference) - kl_weight * (kl_rejected - kl_chosen.detach())))


TERMS: dict[str, Callable[..., Tensor]] = {
    "anchor": anchor,
    "image_conditional": image_conditional,
    "symmetric_image": symmetric_image,
    "tdpo": tdpo,
}
