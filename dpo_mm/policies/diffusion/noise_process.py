"""From clean latents to noisy ones, and what a denoiser should say of them: read off the pipeline's own scheduler.

A level in [0, 1) is a place in the schedule: 0 is clean, 1 pure noise. A noising process turns it into the timestep
that the denoiser is told; noisy latents, target and the target's scale follow from the timestep alone.

    variance preserving   x_t = sqrt(kept) x0 + sqrt(1 - kept) eps     target eps, or v = sqrt(kept) eps - sqrt(1 - kept) x0
    rectified flow        x_t = (1 - s) x0 + s eps                     target eps - x0

kept: the schedule's cumulative alpha. s: timestep / training timesteps. Sources: Ho et al. 2020 (2006.11239), Salimans
and Ho 2022 (2202.00512), Esser et al. 2024 (2403.03206).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

FLOWS = ("flow_prediction",)
"""Prediction types by which a scheduler of another kind says that it runs a rectified flow."""


class NoiseProcess(Protocol):
    """A noising process. timestep: (images,); latents and noise: (images, c, h, w), float32."""

    @property
    def name(self) -> str:
        """What the denoiser predicts: epsilon, v or velocity."""
        ...

    def timesteps(self, levels: Tensor, *, tokens: int) -> Tensor:
        """The timestep of each level, (images,); tokens: of the network, a picture (a shift may follow its size)."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents at a timestep, (images, c, h, w)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the denoiser should predict there, (images, c, h, w)."""
        ...

    def epsilon_error_scale(self, timestep: Tensor) -> Tensor:
        """What a squared error of the target is multiplied by to be one of the noise, (images,), [0, 1]."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """Signal and noise whose squares sum to one, with whole timesteps. kept: (timesteps,), float32. name: epsilon | v."""

    alphas_cumprod: Tensor
    name: str

    def timesteps(self, levels: Tensor, *, tokens: int) -> Tensor:
        total = len(self.alphas_cumprod)
        return (levels * total).long().clamp(max=total - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        kept = self._alphas_cumprod(timestep)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        if self.name == "epsilon":
            return noise
        kept = self._alphas_cumprod(timestep)
        return kept.sqrt() * noise - (1 - kept).sqrt() * latents

    def epsilon_error_scale(self, timestep: Tensor) -> Tensor:
        """From eps = sqrt(kept) v + sqrt(1 - kept) x_t: kept for v, 1 for epsilon."""
        kept = self._alphas_cumprod(timestep).flatten()
        return kept if self.name == "v" else kept.new_ones(len(kept))

    def _alphas_cumprod(self, timestep: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timestep.device)[timestep][:, None, None, None]


@dataclass(frozen=True)
class RectifiedFlow:
    """A straight line between data and noise, with real timesteps. total: training timesteps.

    shift: moves levels (images,) to sigmas s, for pictures of so many tokens.
    """

    total: int
    shift: Callable[[Tensor, int], Tensor]
    name: str = "velocity"

    def timesteps(self, levels: Tensor, *, tokens: int) -> Tensor:
        return self.shift(levels.float(), tokens) * self.total

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        s = self._sigma(timestep)[:, None, None, None]
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return noise - latents

    def epsilon_error_scale(self, timestep: Tensor) -> Tensor:
        """From eps = x_t + (1 - s) velocity: (1 - s)^2."""
        return (1 - self._sigma(timestep)).square()

    def _sigma(self, timestep: Tensor) -> Tensor:
        return timestep.float() / self.total


def noise_process_for(scheduler: Any, *, source: str) -> NoiseProcess:
    """The process that a pipeline's scheduler was made for. Raises ValueError for one that isn't known, by name.

    What a scheduler does to its ladder of sampling steps alone (karras, a terminal sigma) is no part of it.
    """
    config = scheduler.config
    kind = config.get("prediction_type")
    if hasattr(scheduler, "time_shift") and kind is None:
        shift = functools.partial(_dynamic, scheduler) if config.use_dynamic_shifting else _static(config.shift)
        return RectifiedFlow(config.num_train_timesteps, shift)
    if kind in FLOWS:
        return RectifiedFlow(config.num_train_timesteps, _static(config.flow_shift))
    names = {"epsilon": "epsilon", "v_prediction": "v"}
    if hasattr(scheduler, "alphas_cumprod") and kind in names:
        return VariancePreserving(scheduler.alphas_cumprod.float(), names[kind])
    raise ValueError(
        f"model {source!r}: scheduler {type(scheduler).__name__} with prediction_type {kind!r} is not handled; expected "
        "epsilon, v_prediction or flow_prediction, or a FlowMatchEulerDiscreteScheduler"
    )


def _static(shift: float) -> Callable[[Tensor, int], Tensor]:
    """s = shift u / (1 + (shift - 1) u), Esser et al. 2024 eq. 23."""
    return lambda levels, tokens: shift * levels / (1 + (shift - 1) * levels)


def _dynamic(scheduler: Any, levels: Tensor, tokens: int) -> Tensor:
    """The scheduler's own shift, its mu on a line through (base_image_seq_len, base_shift) and the two maxima."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return scheduler.time_shift(mu, 1.0, levels)
