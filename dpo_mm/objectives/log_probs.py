"""Log-probs of both sides of each pair, their log-ratios, and the checks that objectives share.

Symbols, for one pair: w is chosen, l rejected; r = log p_policy - log p_reference is the log-ratio (beta * r is the
implicit reward) and delta = r_w - r_l.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of the chosen and the rejected side of each pair under one model.

    Attributes:
        chosen, rejected: nats, (pairs,), float32.
        num_tokens_chosen, num_tokens_rejected: tokens counted, (pairs,). 1 for an image.
        is_likelihood: True for token log-probs, False for the denoising surrogate -1/2 * error.
    """

    chosen: Tensor
    rejected: Tensor
    num_tokens_chosen: Tensor
    num_tokens_rejected: Tensor
    is_likelihood: bool

    def detach(self) -> LogProbs:
        """Return the same values without gradient."""
        return LogProbs(
            self.chosen.detach(),
            self.rejected.detach(),
            self.num_tokens_chosen,
            self.num_tokens_rejected,
            is_likelihood=self.is_likelihood,
        )


def log_ratios(policy_logps: LogProbs, reference_logps: LogProbs) -> tuple[Tensor, Tensor]:
    """Log-ratios of chosen and rejected.

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.

    Returns:
        r_w and r_l, nats, (pairs,) each.
    """
    return policy_logps.chosen - reference_logps.chosen, policy_logps.rejected - reference_logps.rejected


def deltas(policy_logps: LogProbs, reference_logps: LogProbs) -> Tensor:
    """Difference of the log-ratios of chosen and rejected.

        delta = r_w - r_l

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.

    Returns:
        Nats, (pairs,). Exactly 0 if policy equals reference. Swapping the sides negates it.
    """
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return chosen - rejected


def per_token_deltas(policy_logps: LogProbs, reference_logps: LogProbs) -> Tensor:
    """Difference of the log-ratios per token.

        r_w / tokens_w - r_l / tokens_l

    Args:
        policy_logps, reference_logps: log-probs of chosen and rejected, nats, (pairs,) each.

    Returns:
        Nats per token, (pairs,). For images it is delta.
    """
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return chosen / policy_logps.num_tokens_chosen - rejected / policy_logps.num_tokens_rejected


def denoising_errors(policy_logps: LogProbs) -> tuple[Tensor, Tensor]:
    """Mean squared errors of both sides, from the surrogate -1/2 * error.

    Args:
        policy_logps: log-probs of chosen and rejected, nats, (pairs,) each.

    Returns:
        Errors of chosen and of rejected, (pairs,) each.
    """
    return -2 * policy_logps.chosen, -2 * policy_logps.rejected


def smoothed_logsigmoid_loss(logit: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss with label smoothing e.

        -(1 - e) log s(logit) - e log s(-logit)

    Args:
        logit: any shape.
        label_smoothing: e, [0, 0.5).

    Returns:
        The same shape as logit.
    """
    loss = -F.logsigmoid(logit)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logit)


def sdpo_lambda(square: Tensor, inner: Tensor, *, slack: float) -> Tensor:
    """Diffusion-SDPO's lambda in closed form.

        clip((1 - slack) square / inner, 0, 1), and 1 if inner <= 0

    Args:
        square: |g_w|^2, (pairs,).
        inner: <g_l, g_w>, (pairs,).
        slack: the paper's mu, [0, 1).

    Returns:
        lambda per pair, (pairs,).

    Raises:
        ValueError: if slack is out of range.
    """
    require(0 <= slack < 1, f"slack must be in [0, 1), got {slack}; the paper uses 0.9 for SD1.5 and 0.6 for SDXL")
    opposed = inner <= 0
    return ((1 - slack) * square / inner.masked_fill(opposed, 1)).clamp(0, 1).masked_fill(opposed, 1)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
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


def check_likelihood(policy_logps: LogProbs, name: str) -> None:
    require(
        policy_logps.is_likelihood,
        f"{name} exponentiates a likelihood, and a denoising error is none; for image generators use mapo or sigmoid",
    )


def check_denoising(policy_logps: LogProbs, name: str) -> None:
    require(
        not policy_logps.is_likelihood,
        f"{name} acts on denoising errors, which a text model has none of; use sigmoid or simpo",
    )
