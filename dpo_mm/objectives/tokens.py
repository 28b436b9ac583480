"""What acts on the log-probs of single tokens, before they become `LogProbs`. Text alone.

Departures: `shared_length` weighs policy and reference alike, as the paper's ratio needs and as TRL does; ms-swift and
LLaMA-Factory weigh the policy alone. `sdpo_lambda_text` is ours, after a paper on images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_mm.objectives.log_probs import check_at_least_zero, require, sdpo_lambda


def shared_length(
    chosen: Tensor, rejected: Tensor, chosen_mask: Tensor, rejected_mask: Tensor, *, ld_alpha: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of both sides in which the tokens past the shorter side's length count less (LD-DPO).

    chosen, rejected: log-prob of each token, nats, (pairs, length), lengths may differ. Masks: 1 for a completion's
    token, the same shapes. ld_alpha: the paper's alpha, [0, 1]; 1 is the plain sum.
    Returns nats, (pairs,) each. Raises ValueError outside the range. Source: Liu et al. 2024 (2409.06411).
    """
    require(0 <= ld_alpha <= 1, f"ld_alpha must be in [0, 1], got {ld_alpha}; 0.5 is a usual choice")
    shared = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]
    return _with_tail(chosen, chosen_mask, shared, ld_alpha), _with_tail(rejected, rejected_mask, shared, ld_alpha)


def _with_tail(tokens: Tensor, mask: Tensor, shared: Tensor, ld_alpha: float) -> Tensor:
    position = mask.cumsum(1)
    weight = torch.where(position <= shared, 1.0, ld_alpha) * mask
    return (tokens.masked_fill(mask == 0, 0) * weight).sum(1)


def segment_mean(tokens: Tensor, mask: Tensor, edited: Tensor, *, edited_token_weight: float = 5.0) -> Tensor:
    """Mean log-prob a token in which corrected spans count more: (sum_kept + g sum_edited) / (|kept| + g |edited|).

    tokens: nats, (pairs, length). mask: 1 for a completion's token; edited: 1 for a corrected one, the same shape.
    edited_token_weight: the paper's gamma, >= 0. Returns nats a token, (pairs,); its `LogProbs` has 1 term a side.
    Raises ValueError outside the range. Source: RLHF-V's DDPO, Yu et al. 2023 (2312.00849), gamma 5.
    """
    check_at_least_zero(edited_token_weight=edited_token_weight)
    weight = mask * torch.where(edited.bool(), edited_token_weight, 1.0)
    return (tokens.masked_fill(mask == 0, 0) * weight).sum(1) / weight.sum(1)


def on_policy_weight(tokens: Tensor, mask: Tensor, log_collision: Tensor) -> Tensor:
    """How much one side looks like the policy's own: mean a token of p / sum p^2, geometric, no gradient (WPO).

    tokens: log-prob of each token under the policy, nats, (pairs, length). mask: 1 for a completion's token.
    log_collision: log of the sum of squared probabilities over the vocabulary at each token, (pairs, length).
    Returns (pairs,), 1 for what the policy would sample; a pair's loss is multiplied by both sides' weights.
    Source: Zhou et al. 2024 (2406.11827) eq. 2 with sampled alignment.
    """
    aligned = (tokens - log_collision).detach().masked_fill(mask == 0, 0).sum(1)
    return torch.exp(aligned / mask.sum(1).clamp(min=1))


def sdpo_lambda_text(
    tokens: tuple[Tensor, Tensor], masks: tuple[Tensor, Tensor], ids: tuple[Tensor, Tensor], *, slack: float
) -> Tensor:
    """`sdpo`'s lambda of each pair for answers: what of the rejected side's gradient the chosen side can stand.

    The network's output is a logit for each context and token; both sides' gradients meet where contexts are the same,
    in the answers' common beginning and at the first token that differs. Taken at the logits of the answers' own
    tokens: 1 - p for the token that stands there, -p for the other side's.

    Each a tuple (chosen, rejected) of (pairs, length), lengths may differ. tokens: log-prob of each token, nats. masks:
    1 for a completion's token. ids: the tokens. slack: mu, [0, 1). Returns (pairs,), [0, 1], no gradient; 1 where the
    answers have no common beginning. Raises ValueError outside the range. After Diffusion-SDPO (2511.03317).
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
