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


def surrogate_log_probs(errors: DenoisingErrors) -> LogProbs:
    """Return -1/2 of the mean errors of chosen and rejected, whose images are the first and the second half."""
    chosen, rejected = (-0.5 * errors.mean).chunk(2)
    ones = torch.ones_like(chosen)
    return LogProbs(chosen, rejected, ones, ones, is_likelihood=False)
