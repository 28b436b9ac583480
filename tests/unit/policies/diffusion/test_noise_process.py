"""Noise processes of real schedulers, compared with the arithmetic of those schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from dpo_mm.policies.diffusion.collate import stack_padded
from dpo_mm.policies.diffusion.latents import latent_scale
from dpo_mm.policies.diffusion.noise_process import noise_process_for

LEVELS = torch.tensor([0.001, 0.25, 0.5, 0.999])


def process(scheduler: Any) -> Any:
    return noise_process_for(scheduler, source="m")


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_variance_preserving_matches_the_schedulers_arithmetic(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind)
    ours, (latents, noise) = process(scheduler), latents_and_noise()
    timestep = ours.timesteps(LEVELS, tokens=64)
    assert timestep.tolist() == [1, 250, 500, 999]
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timestep), scheduler.add_noise(latents, noise, timestep), atol=1e-6, rtol=1e-5
    )
    velocity = scheduler.get_velocity(latents, noise, timestep)
    expected = velocity if kind == "v_prediction" else noise
    torch.testing.assert_close(ours.target(latents, noise, timestep), expected, atol=1e-6, rtol=1e-5)


def test_timestep_is_the_floor_of_the_level_and_the_last_one_at_most() -> None:
    """It catches rounding, a factor of the last timestep instead of their number, and no clamp at level 1."""
    levels = torch.tensor([0.0, 0.0004, 0.0006, 0.4999, 0.9996, 1.0])
    timesteps = process(DDIMScheduler(num_train_timesteps=1000)).timesteps(levels, tokens=1)
    assert timesteps.tolist() == [0, 0, 0, 499, 999, 999] and timesteps.dtype == torch.long


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_static_shift_matches_the_scheduler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ladder = torch.arange(1000, 0, -1) / 1000
    ours = process(scheduler)
    torch.testing.assert_close(ours.timesteps(ladder, tokens=1), scheduler.timesteps, atol=1e-3, rtol=1e-6)
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    torch.testing.assert_close(process(solver).timesteps(ladder, tokens=1), ours.timesteps(ladder, tokens=1))


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_rectified_flow_dynamic_shift_depends_on_tokens_as_in_the_scheduler(kind: str, tokens: int, mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours = process(scheduler).timesteps(LEVELS, tokens=tokens)
    scheduler.set_timesteps(sigmas=LEVELS.tolist(), mu=mu)
    torch.testing.assert_close(ours, scheduler.timesteps, atol=1e-3, rtol=1e-5)
    assert process(scheduler).timesteps(torch.zeros(1), tokens=tokens).item() == 0


def test_rectified_flow_add_noise_matches_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours, (latents, noise) = process(scheduler), latents_and_noise()
    timestep = scheduler.timesteps[[1, 300, 600, 998]]
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timestep), scheduler.scale_noise(latents, timestep, noise), atol=1e-6, rtol=1e-5
    )
    assert torch.equal(ours.target(latents, noise, timestep), noise - latents)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_epsilon_error_scale_converts_target_errors_to_noise_errors(scheduler: Any) -> None:
    """Solve for the noise in a wrong prediction: its squared error is the factor times that of the target."""
    ours, (latents, noise) = process(scheduler), latents_and_noise()
    timestep = ours.timesteps(LEVELS, tokens=1)
    noisy, target = (f(latents, noise, timestep).double() for f in (ours.add_noise, ours.target))
    wrong = target + 0.1
    if ours.name == "epsilon":
        implied_noise = wrong
    elif ours.name == "v":
        alpha_bar = scheduler.alphas_cumprod[timestep].double()[:, None, None, None]
        implied_noise = alpha_bar.sqrt() * wrong + (1 - alpha_bar).sqrt() * noisy
    else:
        implied_noise = noisy + (1 - timestep.double()[:, None, None, None] / 1000) * wrong
    noise_error = (implied_noise - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(noise_error, 0.01 * ours.epsilon_error_scale(timestep).double(), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), r"the noise process of scheduler EDMEulerScheduler is not supported"),
        (EulerDiscreteScheduler(prediction_type="sample"), r"prediction_type 'sample' is not supported"),
    ],
)
def test_noise_process_for_unsupported_scheduler_raises_with_its_name(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process(scheduler)


class Config(dict[str, Any]):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.5}, [[1.0, 2.0]]),
        ({"scaling_factor": 0.5, "shift_factor": 1.0}, [[0.5, 1.5]]),
        ({"latents_mean": [1.0, 2.0], "latents_std": [0.5, 4.0]}, [[2.0, 0.5]]),
        (
            {"scaling_factor": 3.0, "shift_factor": None, "latents_mean": [1.0, 2.0], "latents_std": [1, 2]},
            [[3.0, 3.0]],
        ),
    ],
)
def test_latent_scale_follows_the_autoencoders_config(config: dict[str, Any], expected: list[list[float]]) -> None:
    raw = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    scale = latent_scale(Config(config))
    assert scale.normalise(raw).flatten(1).tolist() == expected
    assert torch.equal(scale.denormalise(scale.normalise(raw)), raw)


def test_padded_unequal_lengths_keep_their_dtype() -> None:
    masks = stack_padded([torch.tensor([True, True, True]), torch.tensor([True])])
    assert masks.tolist() == [[True, True, True], [True, False, False]] and masks.dtype == torch.bool
    assert stack_padded([torch.ones(2, 3), torch.ones(1, 3)]).shape == (2, 2, 3)
