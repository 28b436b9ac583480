"""Log-probs of both sides of each pair, and the quantities that objectives compute from them.

Symbols, for one pair: w is chosen and l is rejected. r = log p_policy - log p_reference is the log-ratio, beta * r the
implicit reward, and delta = r_w - r_l.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """Log-probs that a model assigns to the chosen and the rejected side of each pair.

    An image's log-prob is -1/2 of its denoising error, a surrogate and not a likelihood.
    """

    chosen: Tensor
    """Log-prob of the chosen side, nats, (pairs,), float32."""
    rejected: Tensor
    """Log-prob of the rejected side, nats, (pairs,), float32. Empty, (0,), if the rows have a chosen side only."""
    num_tokens_chosen: Tensor
    """Number of tokens in the chosen log-prob, (pairs,). 1 for an image."""
    num_tokens_rejected: Tensor
    """Number of tokens in the rejected log-prob, (pairs,). 1 for an image."""
    is_likelihood: bool
    """True for token log-probs, False for the denoising surrogate."""

    def detach(self) -> LogProbs:
        """Return the same numbers without gradient."""
        return LogProbs(
            self.chosen.detach(),
            self.rejected.detach(),
            self.num_tokens_chosen,
            self.num_tokens_rejected,
            is_likelihood=self.is_likelihood,
        )


def log_ratios(policy_logps: LogProbs, reference_logps: LogProbs) -> tuple[Tensor, Tensor]:
    """Log-ratios r_w of the chosen and r_l of the rejected side, nats, (pairs,) each.

    r = log p_policy - log p_reference
    """
    return policy_logps.chosen - reference_logps.chosen, policy_logps.rejected - reference_logps.rejected


def deltas(policy_logps: LogProbs, reference_logps: LogProbs) -> Tensor:
    """Difference of the log-ratios of chosen and rejected, nats, (pairs,).

        delta = r_w - r_l

    It is exactly 0 if policy and reference agree, and swapping chosen and rejected negates it.
    """
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return chosen - rejected


def per_token_deltas(policy_logps: LogProbs, reference_logps: LogProbs) -> Tensor:
    """Difference of the log-ratios per token, nats, (pairs,). It equals `deltas` for images.

    delta_bar = r_w / tokens_w - r_l / tokens_l
    """
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return chosen / policy_logps.num_tokens_chosen - rejected / policy_logps.num_tokens_rejected


def denoising_errors(policy_logps: LogProbs) -> tuple[Tensor, Tensor]:
    """Mean squared errors of chosen and rejected images, (pairs,) each, recovered from the surrogate.

    err = -2 log p
    """
    return -2 * policy_logps.chosen, -2 * policy_logps.rejected


def smoothed_logsigmoid_loss(logit: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss with label smoothing, for any shape.

    -(1 - e) log sigmoid(logit) - e log sigmoid(-logit),  e = label_smoothing
    """
    loss = -F.logsigmoid(logit)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logit)


def sdpo_lambda(square: Tensor, inner: Tensor, *, slack: float) -> Tensor:
    """Scale of the rejected gradient in `sdpo`, in closed form.

        lambda = clip((1 - slack) square / inner, 0, 1), or 1 if inner is not positive

    Args:
        square: |g_w|^2, squared norm of the chosen side's gradient, (pairs,).
        inner: <g_l, g_w>, inner product of both sides' gradients, (pairs,).
        slack: the paper's mu, in [0, 1).

    Returns:
        Scale per pair, (pairs,), in [0, 1].

    Raises:
        ValueError: if slack is out of range.

    Source: Diffusion-SDPO, Fu et al. 2025 (2511.03317).
    """
    require(0 <= slack < 1, f"slack must be in [0, 1), got {slack}. The paper uses 0.9 for SD1.5 and 0.6 for SDXL")
    opposed = inner <= 0
    return ((1 - slack) * square / inner.masked_fill(opposed, 1)).clamp(0, 1).masked_fill(opposed, 1)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition is true."""
    if not condition:
        raise ValueError(message)


def check_beta(beta: float) -> None:
    """Raise ValueError unless beta is above 0."""
    require(beta > 0, f"beta must be above 0, got {beta}. Text models use about 0.1, image models 2000 to 5000")


def check_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless label_smoothing is in [0, 0.5)."""
    require(
        0 <= label_smoothing < 0.5,
        f"label_smoothing must be in [0, 0.5), got {label_smoothing}. It is the fraction of flipped labels",
    )


def check_at_least_zero(**settings: float) -> None:
    """Raise ValueError if a setting is negative."""
    for name, value in settings.items():
        require(value >= 0, f"{name} must be at least 0, got {value}")


def check_likelihood(policy_logps: LogProbs, name: str) -> None:
    """Raise ValueError if the log-probs are denoising surrogates. name: the objective, for the message."""
    require(
        policy_logps.is_likelihood,
        f"{name} needs a likelihood, and a denoising error is not one. For image generators use mapo or sigmoid",
    )


def check_denoising(policy_logps: LogProbs, name: str) -> None:
    """Raise ValueError if the log-probs are likelihoods. name: the objective, for the message."""
    require(
        not policy_logps.is_likelihood,
        f"{name} needs denoising errors, which a text model does not have. Use sigmoid or simpo",
    )
