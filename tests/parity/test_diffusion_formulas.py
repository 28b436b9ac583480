"""Compare the image objectives with the papers' formulas in float64, on noised latents.

The objective gets float32 predictions, takes their mean squared error, and uses -1/2 of it as the log-prob. The paper's
formula gets the same predictions. Values agree to 1e-5, gradients with respect to the predictions to 1e-4.
Mutations that it catches: the factor 1/2 on one side only, half of beta, the error in place of the log-prob, epsilon in
place of the velocity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_mm import objectives
from dpo_mm.objectives import LogProbs, deltas

PAIRS, SHAPE = 5, (4, 8, 8)
ELEMENTS = math.prod(SHAPE)
BETA = 200.0
TABLE = Path(__file__).parents[2] / "docs" / "benchmarks" / "parity.json"


@dataclass(frozen=True)
class Noised:
    """Predictions and targets of chosen and rejected, (pairs, 4, 8, 8), float64. Both share noise and time."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    target_chosen: Tensor
    target_rejected: Tensor
    time: Tensor
    """Flow time, (pairs,), where 1 is pure noise."""


def sample_predictions(*, flow: bool = False) -> Noised:
    generator = torch.Generator().manual_seed(0)

    def randn(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(PAIRS, *SHAPE, generator=generator, dtype=torch.float64)

    time = torch.linspace(0.1, 0.9, PAIRS, dtype=torch.float64)
    noise, latents_w, latents_l = randn(), randn(), randn()
    targets = (noise - latents_w, noise - latents_l) if flow else (noise, noise)
    reference = [target + randn(0.3) for target in targets]
    # towards the target if positive, away from it if negative
    steps = torch.linspace(-0.1, 0.3, PAIRS, dtype=torch.float64)[:, None, None, None]
    policy = [
        base + s * (target - base) for base, target, s in zip(reference, targets, (steps, steps.flip(0)), strict=True)
    ]
    return Noised(*policy, *reference, *targets, time)


def ours(objective: Callable[[LogProbs, LogProbs], Tensor]) -> Callable[[Noised], Tensor]:
    """Our side: the mean over pairs of an objective on the log-probs of float32 errors."""

    def loss(n: Noised) -> Tensor:
        def log_probs(chosen: Tensor, rejected: Tensor) -> LogProbs:
            errors = [
                ((p.float() - t.float()) ** 2).mean((1, 2, 3))
                for p, t in ((chosen, n.target_chosen), (rejected, n.target_rejected))
            ]
            one = torch.ones(PAIRS)
            return LogProbs(-errors[0] / 2, -errors[1] / 2, one, one, is_likelihood=False)

        return objective(log_probs(n.chosen, n.rejected), log_probs(n.reference_chosen, n.reference_rejected)).mean()

    return loss


# The papers' formulas in float64


def squared_errors(n: Noised) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of squared errors: policy chosen, policy rejected, reference chosen, reference rejected, (pairs,) each."""
    return (
        (n.chosen - n.target_chosen).square().sum((1, 2, 3)),
        (n.rejected - n.target_rejected).square().sum((1, 2, 3)),
        (n.reference_chosen - n.target_chosen).square().sum((1, 2, 3)),
        (n.reference_rejected - n.target_rejected).square().sum((1, 2, 3)),
    )


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-x))


def diffusion_dpo(n: Noised) -> Tensor:
    """Diffusion-DPO as in the authors' code: -1/2 beta times mean errors.

    Source: Wallace et al. 2023, eq. 14.
    """
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    return minus_log_sigmoid(-0.5 * BETA * ((w - l) - (ref_w - ref_l))).mean()


def diffusers_dpo(n: Noised) -> Tensor:
    """diffusers' research script for Stable Diffusion. It has no factor 1/2, so it gets half of our beta."""
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    return minus_log_sigmoid((BETA / 2) * ((ref_w - ref_l) - (w - l))).mean()


def diffusion_kto(n: Noised) -> Tensor:
    """Diffusion-KTO with the KTO utility: 1 - sigmoid(+-(reward - z)), where z is the batch's mean reward, at least 0.

    Source: Li et al. 2024, eq. 9.
    """
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    up, down = -0.5 * BETA * (w - ref_w), -0.5 * BETA * (l - ref_l)
    z = max(0.0, (up.sum() + down.sum()).item() / (2 * PAIRS))
    return (1 - 1 / (1 + torch.exp(-(up - z)))).mean() + (1 - 1 / (1 + torch.exp(down - z))).mean()


def kto_with_batch_z(policy: LogProbs, reference: LogProbs) -> Tensor:
    z = objectives.kto_reference(*objectives.log_ratios(policy, reference), beta=BETA)
    return objectives.kto(policy, reference, beta=BETA, z=z)


def mapo(n: Noised) -> Tensor:
    """MaPO with the authors' constants: s = 1/2, beta = 0.1, T = 1000.

    Source: Hong et al. 2024.
    """
    w, l, _, _ = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    lead = 0.5 * w / (torch.exp(0.5 * w) - 1) - 0.5 * l / (torch.exp(0.5 * l) - 1)
    return (w + 0.1 * minus_log_sigmoid(1000 * lead)).mean()


def flow_dpo(n: Noised) -> Tensor:
    """Flow-DPO with a constant beta: -log sigmoid(-beta/2 (|v_w - v|^2 - ...)), with sums of squares.

    Source: Liu et al. 2025 (2501.13918).
    """
    w, l, ref_w, ref_l = squared_errors(n)  # noqa: E741
    return minus_log_sigmoid(-(BETA / ELEMENTS) / 2 * ((w - ref_w) - (l - ref_l))).mean()


def flow_dpo_noise_weighted(n: Noised) -> Tensor:
    """Flow-DPO with beta_t = beta (1 - t)^2.

    This is a constant beta on the noise error, because noise = velocity + clean latents.
    """
    w, l, ref_w, ref_l = squared_errors(n)  # noqa: E741
    return minus_log_sigmoid(-(BETA / ELEMENTS) / 2 * (1 - n.time) ** 2 * ((w - ref_w) - (l - ref_l))).mean()


def noise_weighted_sigmoid(policy: LogProbs, reference: LogProbs) -> Tensor:
    """Our sigmoid loss on noise errors: velocity errors times (1 - t)^2."""
    weight = (1 - sample_predictions(flow=True).time.float()) ** 2

    def weighted(side: LogProbs) -> LogProbs:
        return LogProbs(
            weight * side.chosen,
            weight * side.rejected,
            side.num_tokens_chosen,
            side.num_tokens_rejected,
            is_likelihood=False,
        )

    return objectives.sigmoid(weighted(policy), weighted(reference), beta=BETA)


def sigmoid(policy: LogProbs, reference: LogProbs) -> Tensor:
    return objectives.sigmoid(policy, reference, beta=BETA)


@dataclass(frozen=True)
class Formula:
    """An objective and the paper's formula that it must equal. If `flow` is true, the targets are velocities."""

    objective: str
    peer: str
    ours: Callable[[Noised], Tensor]
    theirs: Callable[[Noised], Tensor]
    flow: bool = False


FORMULAS = [
    Formula("sigmoid on images", "Diffusion-DPO, with its 1/2", ours(sigmoid), diffusion_dpo),
    Formula("sigmoid on images", "diffusers' script, half the beta", ours(sigmoid), diffusers_dpo),
    Formula("kto on images", "Diffusion-KTO", ours(kto_with_batch_z), diffusion_kto),
    Formula("mapo", "MaPO", ours(lambda policy, _: objectives.mapo(policy)), mapo),
    Formula("sigmoid on velocities", "Flow-DPO, constant beta", ours(sigmoid), flow_dpo, flow=True),
    Formula(
        "sigmoid on velocities, noise-weighted",
        "Flow-DPO, beta (1 - t)^2",
        ours(noise_weighted_sigmoid),
        flow_dpo_noise_weighted,
        True,
    ),
]


def difference(formula: Formula) -> tuple[float, float]:
    """Return the difference of the values and the relative difference of the gradients.

    The difference of the values is relative if the value is above 1. Gradients are with respect to both predictions.
    """
    results = []
    for loss in (formula.ours, formula.theirs):
        n = sample_predictions(flow=formula.flow)
        n.chosen.requires_grad_()
        n.rejected.requires_grad_()
        loss_value = loss(n)
        results.append((loss_value.item(), torch.cat(torch.autograd.grad(loss_value, (n.chosen, n.rejected)))))
    (value, gradient), (expected, expected_gradient) = results
    gradient_difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
    return abs(value - expected) / max(1.0, abs(expected)), gradient_difference.item()


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.peer)
def test_objective_equals_the_papers_formula(formula: Formula) -> None:
    value, gradient = difference(formula)
    assert value <= 1e-5
    assert gradient <= 1e-4


def test_factor_half_changes_the_loss() -> None:
    """The same beta gives different losses in the authors' convention and in the diffusers script's."""
    n = sample_predictions()
    doubled = ours(lambda p, r: objectives.sigmoid(p, r, beta=2 * BETA))(n)
    assert doubled.item() != pytest.approx(diffusers_dpo(n).item(), abs=1e-3)
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    assert doubled.item() == pytest.approx(
        minus_log_sigmoid(BETA * ((ref_w - ref_l) - (w - l))).mean().item(), abs=1e-5
    )


def test_kto_comparison_has_a_z_above_zero() -> None:
    """A z that is clipped to 0 would hide errors in the comparison of KTO."""
    n = sample_predictions()
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    rewards = -0.5 * BETA * torch.cat([w - ref_w, l - ref_l])
    assert rewards.mean() > 0.05 and rewards.min() < -0.05
    delta = rewards[:PAIRS] - rewards[PAIRS:]
    assert delta.min() < -0.05 and delta.max() > 0.05


def test_noise_error_is_the_velocity_error_times_one_minus_t() -> None:
    """x_t = (1 - t) x0 + t e and v = e - x0, so e = x_t + (1 - t) v. This identity relates the two weightings."""
    n, flow = sample_predictions(flow=True), torch.linspace(0.1, 0.9, PAIRS, dtype=torch.float64)[:, None, None, None]
    noise = torch.randn(PAIRS, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    latents = noise - n.target_chosen
    mixed = (1 - flow) * latents + flow * noise
    predicted = mixed + (1 - flow) * n.chosen
    assert torch.allclose(predicted - noise, (1 - flow) * (n.chosen - n.target_chosen))


def test_beta_5000_in_sum_reduced_units() -> None:
    """5000 on mean errors is 0.305 on summed errors for 4x64x64, 0.076 for 4x128x128, 0.019 for 16x128x128."""
    for shape, expected in (((4, 64, 64), 0.305), ((4, 128, 128), 0.076), ((16, 128, 128), 0.019)):
        assert 5000 / math.prod(shape) == pytest.approx(expected, abs=5e-4)


def test_delta_is_relative_to_the_reference_errors() -> None:
    """Mutation that it catches: a delta that is not relative to the reference."""
    n = sample_predictions()
    recorded: list[Tensor] = []
    ours(lambda policy, reference: recorded.append(deltas(policy, reference)) or sigmoid(policy, reference))(n)
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squared_errors(n))  # noqa: E741
    assert recorded[0].tolist() == pytest.approx((-0.5 * ((w - ref_w) - (l - ref_l))).tolist(), abs=1e-6)


def test_parity_json_contains_the_formulas() -> None:
    rows = {(row["objective"], row["peer"]) for row in json.loads(TABLE.read_text())["rows"]}
    assert {(f.objective, f.peer) for f in FORMULAS} <= rows and len(FORMULAS) == 6
