"""Noise processes of the pipelines' schedulers: noisy latents, the denoiser's target and its timestep.

A noise level in [0, 1) is a position in the schedule: 0 is clean and 1 is pure noise. A noise process maps it to the
timestep on which the denoiser is conditioned. Noisy latents, target and error scale follow from the timestep.

    variance preserving   x_t = sqrt(a) x_0 + sqrt(1 - a) eps     target eps, or v = sqrt(a) eps - sqrt(1 - a) x_0
    rectified flow        x_t = (1 - s) x_0 + s eps               target eps - x_0

Here a is the schedule's cumulative alpha at the timestep (alphas_cumprod), and s = timestep / number of training
timesteps. Sources: Ho et al. 2020 (2006.11239), Salimans and Ho 2022 (2202.00512), Esser et al. 2024 (2403.03206).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

FLOWS = ("flow_prediction",)
"""Prediction types of schedulers of another kind that run a rectified flow."""


class NoiseProcess(Protocol):
    """A noise process. Latents and noise are (images, channels, [frames,] height, width) in float32, timesteps (images,)."""

    @property
    def name(self) -> str:
        """Quantity that the denoiser predicts: epsilon, v or velocity."""
        ...

    def timesteps(self, levels: Tensor, *, tokens: int) -> Tensor:
        """Return the timestep of each noise level, (images,).

        Args:
            levels: noise levels in [0, 1), (images,).
            tokens: number of the denoiser's tokens per image, on which a shift of the schedule may depend.
        """
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the noisy latents at a timestep, in the shape of the latents."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the denoiser's target at a timestep, in the shape of the latents."""
        ...

    def epsilon_error_scale(self, timestep: Tensor) -> Tensor:
        """Return the factor from a squared error of the target to that of the noise, (images,), in [0, 1]."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """Noise process whose squared weights of signal and noise sum to one, with integer timesteps."""

    alphas_cumprod: Tensor
    """Cumulative alphas of the schedule, (timesteps,), float32."""
    name: str
    """epsilon or v."""
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Copies of the schedule, because each copy from the host waits for the GPU."""

    def timesteps(self, levels: Tensor, *, tokens: int) -> Tensor:
        """Return floor(level * number of timesteps), (images,)."""
        count = len(self.alphas_cumprod)
        return (levels * count).long().clamp(max=count - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return sqrt(a) x_0 + sqrt(1 - a) eps."""
        alpha_bar = _column(self._alpha_bar(timestep), latents)
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return eps, or v = sqrt(a) eps - sqrt(1 - a) x_0."""
        if self.name == "epsilon":
            return noise
        alpha_bar = _column(self._alpha_bar(timestep), latents)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents

    def epsilon_error_scale(self, timestep: Tensor) -> Tensor:
        """Return a for v, because eps = sqrt(a) v + sqrt(1 - a) x_t, and 1 for epsilon."""
        alpha_bar = self._alpha_bar(timestep)
        return alpha_bar if self.name == "v" else alpha_bar.new_ones(len(alpha_bar))

    def _alpha_bar(self, timestep: Tensor) -> Tensor:
        device = timestep.device
        if device not in self._on_device:
            self._on_device[device] = self.alphas_cumprod.to(device)
        return self._on_device[device][timestep]


@dataclass(frozen=True)
class RectifiedFlow:
    """Noise process on a straight line between data and noise, with real timesteps."""

    total: int
    """Number of training timesteps."""
    shift: Callable[[Tensor, int], Tensor]
    """Function from noise levels, (images,), and the number of tokens per image to sigmas s, (images,)."""
    name: str = "velocity"

    def timesteps(self, levels: Tensor, *, tokens: int) -> Tensor:
        """Return s * number of training timesteps, (images,)."""
        return self.shift(levels.float(), tokens) * self.total

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return (1 - s) x_0 + s eps."""
        s = _column(self._sigma(timestep), latents)
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return eps - x_0."""
        return noise - latents

    def epsilon_error_scale(self, timestep: Tensor) -> Tensor:
        """Return (1 - s)^2, because eps = x_t + (1 - s) velocity."""
        return (1 - self._sigma(timestep)).square()

    def _sigma(self, timestep: Tensor) -> Tensor:
        return timestep.float() / self.total


def _column(values: Tensor, latents: Tensor) -> Tensor:
    """Return one value per image, (images,), in the shape (images, 1, ...) that multiplies latents."""
    return values.reshape(-1, *[1] * (latents.ndim - 1))


def noise_process_for(scheduler: Any, *, source: str) -> NoiseProcess:
    """Return the noise process of a pipeline's scheduler.

    Settings that only change the steps of sampling (Karras sigmas, a terminal sigma) are ignored.

    Args:
        scheduler: a diffusers scheduler.
        source: folder or hub id of the pipeline, for the error.

    Raises:
        ValueError: if the scheduler or its prediction type is not supported.
    """
    config = scheduler.config
    kind = config.get("prediction_type")
    if hasattr(scheduler, "time_shift") and kind is None:
        shift = (
            functools.partial(_dynamic_shift, scheduler) if config.use_dynamic_shifting else _static_shift(config.shift)
        )
        return RectifiedFlow(config.num_train_timesteps, shift)
    if kind in FLOWS:
        return RectifiedFlow(config.num_train_timesteps, _static_shift(config.flow_shift))
    names = {"epsilon": "epsilon", "v_prediction": "v"}
    if hasattr(scheduler, "alphas_cumprod") and kind in names:
        return VariancePreserving(scheduler.alphas_cumprod.float(), names[kind])
    if kind in names:  # EDM, whose noise grows with sigma and whose network is preconditioned
        raise ValueError(
            f"model {source!r}: the noise process of scheduler {type(scheduler).__name__} is not supported. Expected that of "
            "DDPM (with alphas_cumprod) or rectified flow, such as a DDIMScheduler or a FlowMatchEulerDiscreteScheduler"
        )
    raise ValueError(
        f"model {source!r}: scheduler {type(scheduler).__name__} with prediction_type {kind!r} is not supported. Expected "
        "epsilon, v_prediction or flow_prediction, or a FlowMatchEulerDiscreteScheduler"
    )


def _static_shift(shift: float) -> Callable[[Tensor, int], Tensor]:
    """s = shift u / (1 + (shift - 1) u), Esser et al. 2024, eq. 23."""
    return lambda levels, tokens: shift * levels / (1 + (shift - 1) * levels)


def _dynamic_shift(scheduler: Any, levels: Tensor, tokens: int) -> Tensor:
    """Scheduler's own shift, with mu on the line from the base to the maximal sequence length and shift."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return scheduler.time_shift(mu, 1.0, levels)
