"""Denoising errors of a batch, and the surrogate log-probs that they give.

Source: Wallace et al. 2023 (2311.12908), eq. 14.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mm.objectives import LogProbs


class DenoisingErrors(NamedTuple):
    """Denoising errors of the images of a batch."""

    mean: Tensor
    """Mean squared error per image, (images,), float32."""
    residual: Tensor
    """Prediction minus target, (images, channels, height, width), float32, without gradient."""


def surrogate_log_probs(errors: DenoisingErrors, *, pairs: int) -> LogProbs:
    """Return -1/2 of the mean errors of chosen and rejected.

    Args:
        errors: of the chosen images, then of the rejected ones, (2 * pairs,), or of the chosen images only, (pairs,).
        pairs: number of chosen images.
    """
    chosen, rejected = (-0.5 * errors.mean).split([pairs, len(errors.mean) - pairs])
    return LogProbs(chosen, rejected, torch.ones_like(chosen), torch.ones_like(rejected), is_likelihood=False)
