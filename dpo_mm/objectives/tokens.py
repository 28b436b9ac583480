"""Functions on the log-probs of single tokens, before they become `LogProbs`. Text only.

Departures: `shared_length` weights policy and reference alike, as the paper's ratio needs and as TRL does. ms-swift and
LLaMA-Factory weight only the policy. `sdpo_lambda_text` is this project's, after a paper on images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_mm.objectives.log_probs import check_at_least_zero, require, sdpo_lambda


def shared_length(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    ld_alpha: float,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum token log-probs with a smaller weight for tokens past the shorter side's length (LD-DPO).

        log p = sum of the first n tokens + alpha * sum of the rest,  n = length of the shorter side,  alpha = ld_alpha

    A longer side then gains or loses little by its length.

    Args:
        chosen: log-prob of each token of chosen, nats, (pairs, length).
        rejected: the same of rejected. Its length may differ.
        chosen_mask: 1 for a token of the completion, the same shape as chosen.
        rejected_mask: the same for rejected.
        ld_alpha: the paper's alpha, in [0, 1]. 1 is the plain sum.
        shared: n, (pairs,), if a side has other tokens here. None: from the masks.

    Returns:
        Log-probs of chosen and of rejected, nats, (pairs,) each.

    Raises:
        ValueError: if ld_alpha is out of range.

    Source: Liu et al. 2024 (2409.06411).
    """
    require(0 <= ld_alpha <= 1, f"ld_alpha must be in [0, 1], got {ld_alpha}. 0.5 is a usual choice")
    count = (torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1)) if shared is None else shared)[:, None]
    return _with_tail(chosen, chosen_mask, count, ld_alpha), _with_tail(rejected, rejected_mask, count, ld_alpha)


def _with_tail(tokens: Tensor, mask: Tensor, shared: Tensor, ld_alpha: float) -> Tensor:
    position = mask.cumsum(1)
    weight = torch.where(position <= shared, 1.0, ld_alpha) * mask
    return (tokens.masked_fill(mask == 0, 0) * weight).sum(1)


def segment_mean(tokens: Tensor, mask: Tensor, edited: Tensor, *, edited_token_weight: float = 5.0) -> Tensor:
    """Average token log-probs with a larger weight for corrected tokens (RLHF-V's DDPO).

        (sum over unchanged tokens + g * sum over edited tokens) / (number unchanged + g * number edited)

    Here g = edited_token_weight. The loss concentrates on the words that the correction changed.

    Args:
        tokens: log-prob of each token, nats, (pairs, length).
        mask: 1 for a token of the completion, the same shape.
        edited: 1 for a corrected token, the same shape.
        edited_token_weight: the paper's gamma, >= 0.

    Returns:
        Mean log-prob per token, nats, (pairs,). The number of tokens of its `LogProbs` is 1 per side.

    Raises:
        ValueError: if edited_token_weight is out of range.

    Source: Yu et al. 2023 (2312.00849), gamma 5.
    """
    check_at_least_zero(edited_token_weight=edited_token_weight)
    weight = mask * torch.where(edited.bool(), edited_token_weight, 1.0)
    return (tokens.masked_fill(mask == 0, 0) * weight).sum(1) / weight.sum(1)


def on_policy_weight(tokens: Tensor, mask: Tensor, log_collision: Tensor) -> Tensor:
    """Weight of one side by how close it is to what the policy would sample (WPO).

        exp(mean over tokens of log p - log(sum of p^2 over the vocabulary))

    Multiply a pair's loss by the weights of both sides, so that on-policy pairs count most.

    Args:
        tokens: log-prob of each token under the policy, nats, (pairs, length).
        mask: 1 for a token of the completion, the same shape.
        log_collision: log of the sum of squared probabilities over the vocabulary at each token, the same shape.

    Returns:
        Weight per side, (pairs,), without gradient. It is about 1 for a response that the policy would sample.

    Source: Zhou et al. 2024 (2406.11827), eq. 2 with sampled alignment.
    """
    aligned = (tokens - log_collision).detach().masked_fill(mask == 0, 0).sum(1)
    return torch.exp(aligned / mask.sum(1).clamp(min=1))


def sdpo_lambda_text(
    tokens: tuple[Tensor, Tensor], masks: tuple[Tensor, Tensor], ids: tuple[Tensor, Tensor], *, slack: float
) -> Tensor:
    """Scale of `sdpo` for text: the largest one that keeps the chosen log-prob from falling.

        lambda = clip((1 - mu) |g_w|^2 / <g_l, g_w>, 0, 1), or 1 if the inner product is not positive,  mu = slack

    The network's output is a logit per context and token. The gradients g_w and g_l of both responses overlap only in
    equal contexts: in their common prefix, and at the first token that differs. They are taken at the logits of the
    responses' own tokens: 1 - p for the token of this response, and -p for the token of the other one.

    Args:
        tokens: log-prob of each token of chosen and of rejected, nats, (pairs, length) each. Lengths may differ.
        masks: 1 for a token of the completion, in the same shapes.
        ids: the token ids, in the same shapes.
        slack: mu, in [0, 1).

    Returns:
        Scale per pair, (pairs,), in [0, 1], without gradient. It is 1 if the responses have no common prefix.

    Raises:
        ValueError: if slack is out of range.

    Source: after Diffusion-SDPO, Fu et al. 2025 (2511.03317).
    """
    length = min(part.shape[1] for part in tokens)
    (p_w, p_l), (m_w, m_l) = ([part.detach()[:, :length] for part in side] for side in (tokens, masks))
    p_w, p_l, both = p_w.exp(), p_l.exp(), (m_w * m_l).bool()
    equal = (ids[0][:, :length] == ids[1][:, :length]) & both
    common = equal.long().cumprod(1)
    in_common_context = torch.cat([torch.ones_like(common[:, :1]), common[:, :-1]], 1)
    first_difference = in_common_context * both * (1 - common)
    inner = (common * (1 - p_w) * (1 - p_l) - first_difference * (p_w * (1 - p_w) + p_l * (1 - p_l))).sum(1)
    own_square = (1 - tokens[0].detach().exp()).square().masked_fill(masks[0] == 0, 0).sum(1)
    return sdpo_lambda(own_square + (first_difference * p_l.square()).sum(1), inner, slack=slack)
