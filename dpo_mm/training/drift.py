"""Warnings that a run says once: the chosen side drifts away from the reference while the loss falls.

Both look at means over the last logs, relative to the reference; with one that follows the policy, to where it is now.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

WINDOW = 10
"""Logs that are averaged."""
DISPLACED = -1.0
"""Implicit reward of the chosen side, beta * log-ratio, below which text is warned of."""
DRIFTED = 1.1
"""Denoising error of the chosen side relative to the reference's, above which an image generator is warned of."""


class _Watch(TrainerCallback):
    """Says `advice` once when the mean of a logged number over the last WINDOW logs passes `limit`."""

    name: str
    limit: float
    above: bool
    advice: str

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=WINDOW)
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.warned or not logs or self.name not in logs:
            return
        self.seen.append(logs[self.name])
        mean = sum(self.seen) / len(self.seen)
        if len(self.seen) == WINDOW and (mean > self.limit if self.above else mean < self.limit):
            self.warned = True
            logger.warning("step %d: %s", state.global_step, self.advice.format(mean=mean, window=WINDOW))


class Displacement(_Watch):
    """Text: the chosen answer itself becomes unlikely. Source: Razin et al. 2024 (2410.08847); Pal et al. 2402.13228."""

    name, limit, above = "reward_chosen", DISPLACED, False
    advice = (
        "chosen answers are less likely than under the reference (implicit reward {mean:.2f} over the last {window} "
        "logs), only less so than rejected ones; give sft_weight (1), or take objective dpop, a higher beta or fewer steps"
    )


class ErrorDrift(_Watch):
    """Images: the denoising error of the chosen picture itself rises. Source: Diffusion-SDPO (2511.03317) section 3."""

    name, limit, above = "error_chosen", DRIFTED, True
    advice = (
        "the denoising error of chosen pictures is {mean:.2f} times the reference's over the last {window} logs; look at "
        "pictures, not at the loss. If they get worse: objective safe, a higher beta, a lower learning_rate or fewer steps"
    )
