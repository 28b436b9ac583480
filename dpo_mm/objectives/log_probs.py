"""What the objectives act on: log-probs of both sides of each pair, and what is made of them.

Symbols, for one pair: w is chosen, l rejected; r = log p_policy - log p_reference is the log-ratio (beta * r is the
implicit reward) and delta = r_w - r_l.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """How likely a model finds the chosen and the rejected side of each pair.

    chosen, rejected: nats, (pairs,), float32. terms_chosen, terms_rejected: tokens counted, (pairs,); 1 for an image.
    is_likelihood: True for token log-probs, False for the denoising surrogate -1/2 * error.
    """

    chosen: Tensor
    rejected: Tensor
    num_tokens_chosen: Tensor
    num_tokens_rejected: Tensor
    is_likelihood: bool

    def detach(self) -> LogProbs:
        """The same numbers without gradient."""
        return LogProbs(
            self.chosen.detach(),
            self.rejected.detach(),
            self.num_tokens_chosen,
            self.num_tokens_rejected,
            is_likelihood=self.is_likelihood,
        )


def log_ratios(policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor]:
    """r of the chosen and of the rejected side, nats, each (pairs,)."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def deltas(policy: LogProbs, reference: LogProbs) -> Tensor:
    """delta = r_w - r_l, nats, (pairs,); exactly 0 where policy equals reference, negated by swapping the sides."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen - rejected


def per_token_deltas(policy: LogProbs, reference: LogProbs) -> Tensor:
    """delta of the log-ratios a term: r_w / terms_w - r_l / terms_l, nats, (pairs,); delta itself for images."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.num_tokens_chosen - rejected / policy.num_tokens_rejected


def denoising_errors(policy: LogProbs) -> tuple[Tensor, Tensor]:
    """Mean squared errors of both sides, each (pairs,): the surrogate -1/2 * error read backwards."""
    return -2 * policy.chosen, -2 * policy.rejected


def smoothed_logsigmoid_loss(logit: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(logit) - e log sigmoid(-logit), with e the label_smoothing; any shape."""
    loss = -F.logsigmoid(logit)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logit)


def sdpo_lambda(square: Tensor, inner: Tensor, *, slack: float) -> Tensor:
    """clip((1 - slack) square / inner, 0, 1), 1 where inner is not positive: Diffusion-SDPO's lambda in closed form.

    square: |g_w|^2, inner: <g_l, g_w>, (pairs,) each. Raises ValueError where slack is outside [0, 1).
    """
    require(0 <= slack < 1, f"slack must be in [0, 1), got {slack}; the paper uses 0.9 for SD1.5 and 0.6 for SDXL")
    opposed = inner <= 0
    return ((1 - slack) * square / inner.masked_fill(opposed, 1)).clamp(0, 1).masked_fill(opposed, 1)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_beta(beta: float) -> None:
    require(beta > 0, f"beta must be above 0, got {beta}; text models use about 0.1, image models 2000 to 5000")


def check_smoothing(label_smoothing: float) -> None:
    require(
        0 <= label_smoothing < 0.5,
        f"label_smoothing must be in [0, 0.5), got {label_smoothing}; it is the share of flipped labels",
    )


def check_at_least_zero(**settings: float) -> None:
    for name, value in settings.items():
        require(value >= 0, f"{name} must be at least 0, got {value}")


def check_likelihood(policy: LogProbs, name: str) -> None:
    require(
        policy.is_likelihood,
        f"{name} exponentiates a likelihood, and a denoising error is none; for image generators use mapo or sigmoid",
    )


def check_denoising(policy: LogProbs, name: str) -> None:
    require(
        not policy.is_likelihood,
        f"{name} acts on denoising errors, which a text model has none of; use sigmoid or simpo",
    )
