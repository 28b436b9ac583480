"""Functions of the log-probs of single tokens, before they become `LogProbs`. Only for text.

Departures: `shared_length` weights policy and reference alike, as the paper's ratio needs and as TRL does. ms-swift and
LLaMA-Factory weight only the policy. `sdpo_lambda_text` is ours, after a paper on images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_mm.objectives.log_probs import check_at_least_zero, require, sdpo_lambda


def shared_length(
    chosen: Tensor, rejected: Tensor, chosen_mask: Tensor, rejected_mask: Tensor, *, ld_alpha: float
) -> tuple[Tensor, Tensor]:
    """Sum token log-probs with a smaller weight past the shorter side's length (LD-DPO).

    Args:
        chosen, rejected: log-prob per token, nats, (pairs, length). Lengths may differ.
        chosen_mask, rejected_mask: 1 for a completion's token, of the same shapes.
        ld_alpha: the paper's alpha, [0, 1]. 1 is the plain sum.

    Returns:
        Log-probs of chosen and of rejected, nats, (pairs,) each.

    Raises:
        ValueError: if ld_alpha is out of range.

    Source: Liu et al. 2024 (2409.06411).
    """
    require(0 <= ld_alpha <= 1, f"ld_alpha must be in [0, 1], got {ld_alpha}; 0.5 is a usual choice")
    shared = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]
    return _with_tail(chosen, chosen_mask, shared, ld_alpha), _with_tail(rejected, rejected_mask, shared, ld_alpha)


def _with_tail(tokens: Tensor, mask: Tensor, shared: Tensor, ld_alpha: float) -> Tensor:
    position = mask.cumsum(1)
    weight = torch.where(position <= shared, 1.0, ld_alpha) * mask
    return (tokens.masked_fill(mask == 0, 0) * weight).sum(1)


def segment_mean(tokens: Tensor, mask: Tensor, edited: Tensor, *, edited_token_weight: float = 5.0) -> Tensor:
    """Mean log-prob per token in which corrected spans count more.

        (sum of unchanged + g sum of edited) / (|unchanged| + g |edited|)

    Args:
        tokens: nats, (pairs, length).
        mask: 1 for a completion's token.
        edited: 1 for a corrected token, of the same shape.
        edited_token_weight: the paper's gamma g, >= 0.

    Returns:
        Nats per token, (pairs,). A `LogProbs` of them counts one token per side.

    Raises:
        ValueError: if edited_token_weight is negative.

    Source: RLHF-V's DDPO, Yu et al. 2023 (2312.00849), with gamma 5.
    """
    check_at_least_zero(edited_token_weight=edited_token_weight)
    weight = mask * torch.where(edited.bool(), edited_token_weight, 1.0)
    return (tokens.masked_fill(mask == 0, 0) * weight).sum(1) / weight.sum(1)


def on_policy_weight(tokens: Tensor, mask: Tensor, log_collision: Tensor) -> Tensor:
    """Weight of one side by its similarity to the policy's own samples (WPO).

        exp(mean per token of (log p - log sum p^2)), geometric, without gradient

    Args:
        tokens: log-prob of each token under the policy, nats, (pairs, length).
        mask: 1 for a completion's token.
        log_collision: log of the sum of squared probabilities over the vocabulary, per token, (pairs, length).

    Returns:
        Weight per pair, (pairs,). 1 for a text that the policy would sample. A pair's loss is multiplied by both sides' weights.

    Source: Zhou et al. 2024 (2406.11827), eq. 2, with sampled alignment.
    """
    aligned = (tokens - log_collision).detach().masked_fill(mask == 0, 0).sum(1)
    return torch.exp(aligned / mask.sum(1).clamp(min=1))


def sdpo_lambda_text(
    tokens: tuple[Tensor, Tensor], masks: tuple[Tensor, Tensor], ids: tuple[Tensor, Tensor], *, slack: float
) -> Tensor:
    """`sdpo`'s lambda for text: the largest scale of the rejected gradient that the chosen side tolerates.

    The network's output is one logit per context and token. Both sides' gradients meet if the contexts are equal: in the
    common beginning of the two responses and at the first token that differs. They are taken at the logits of the responses'
    own tokens: 1 - p for the token of that side, -p for the other side's.

    Args:
        tokens: log-prob per token of (chosen, rejected), nats, (pairs, length) each. Lengths may differ.
        masks: 1 for a completion's token, of the same shapes.
        ids: token ids, of the same shapes.
        slack: mu, [0, 1).

    Returns:
        lambda per pair, (pairs,), [0, 1], without gradient. 1 if the responses have no common beginning.

    Raises:
        ValueError: if slack is out of range.

    Source: after Diffusion-SDPO (2511.03317), which is on images.
    """
    length = min(part.shape[1] for part in tokens)
    (p_w, p_l), (m_w, m_l) = ([part.detach()[:, :length] for part in side] for side in (tokens, masks))
    p_w, p_l, both = p_w.exp(), p_l.exp(), (m_w * m_l).bool()
    equal = (ids[0][:, :length] == ids[1][:, :length]) & both
    common = equal.long().cumprod(1)
    begun = torch.cat([torch.ones_like(common[:, :1]), common[:, :-1]], 1)
    parting = begun * both * (1 - common)
    inner = (common * (1 - p_w) * (1 - p_l) - parting * (p_w * (1 - p_w) + p_l * (1 - p_l))).sum(1)
    own = (1 - tokens[0].detach().exp()).square().masked_fill(masks[0] == 0, 0).sum(1)
    return sdpo_lambda(own + (parting * p_l.square()).sum(1), inner, slack=slack)
