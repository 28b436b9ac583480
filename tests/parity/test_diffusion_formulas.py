"""Image objectives against few-line calculations in float64 straight from the papers, on noised latents.

Ours gets float32 predictions, takes the mean squared error, and -1/2 of it as log-prob; the other side is the paper's
formula on the same predictions. Values to 1e-5, gradients by the predictions to 1e-4.
Mutations that it catches: the 1/2 on one side only, a beta that is halved, error for log-prob, epsilon for velocity.
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
    """Predictions and targets of both sides, (pairs, 4, 8, 8), float64; chosen and rejected share noise and time."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    target_chosen: Tensor
    target_rejected: Tensor
    time: Tensor
    """Flow time, (pairs,); 1 is pure noise."""


def noised(*, flow: bool = False) -> Noised:
    generator = torch.Generator().manual_seed(0)

    def randn(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(PAIRS, *SHAPE, generator=generator, dtype=torch.float64)

    time = torch.linspace(0.1, 0.9, PAIRS, dtype=torch.float64)
    noise, latents_w, latents_l = randn(), randn(), randn()
    targets = (noise - latents_w, noise - latents_l) if flow else (noise, noise)
    reference = [target + randn(0.3) for target in targets]
    steps = torch.linspace(-0.1, 0.3, PAIRS, dtype=torch.float64)[:, None, None, None]  # towards the target, or away
    policy = [
        base + s * (target - base) for base, target, s in zip(reference, targets, (steps, steps.flip(0)), strict=True)
    ]
    return Noised(*policy, *reference, *targets, time)


def ours(objective: Callable[[LogProbs, LogProbs], Tensor]) -> Callable[[Noised], Tensor]:
    """The mean over pairs of an objective on surrogate log-probs, float32."""

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


# The papers, in float64


def squares(n: Noised) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of squared errors: policy chosen, rejected, reference chosen, rejected."""
    return (
        (n.chosen - n.target_chosen).square().sum((1, 2, 3)),
        (n.rejected - n.target_rejected).square().sum((1, 2, 3)),
        (n.reference_chosen - n.target_chosen).square().sum((1, 2, 3)),
        (n.reference_rejected - n.target_rejected).square().sum((1, 2, 3)),
    )


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-x))


def diffusion_dpo(n: Noised) -> Tensor:
    """Wallace et al. 2023, eq. 14, as their code reads it: errors are means, and -1/2 beta stands before them."""
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squares(n))  # noqa: E741
    return minus_log_sigmoid(-0.5 * BETA * ((w - l) - (ref_w - ref_l))).mean()


def diffusers_dpo(n: Noised) -> Tensor:
    """diffusers' research script for Stable Diffusion, with half of our beta: no 1/2 there."""
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squares(n))  # noqa: E741
    return minus_log_sigmoid((BETA / 2) * ((ref_w - ref_l) - (w - l))).mean()


def diffusion_kto(n: Noised) -> Tensor:
    """Li et al. 2024, eq. 9 with the KTO utility: 1 - sigmoid(+-(reward - z)), z the batch's mean reward, at least 0."""
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squares(n))  # noqa: E741
    up, down = -0.5 * BETA * (w - ref_w), -0.5 * BETA * (l - ref_l)
    z = max(0.0, (up.sum() + down.sum()).item() / (2 * PAIRS))
    return (1 - 1 / (1 + torch.exp(-(up - z)))).mean() + (1 - 1 / (1 + torch.exp(down - z))).mean()


def with_own_z(policy: LogProbs, reference: LogProbs) -> Tensor:
    z = objectives.kto_reference(*objectives.log_ratios(policy, reference), beta=BETA)
    return objectives.kto(policy, reference, beta=BETA, z=z)


def mapo(n: Noised) -> Tensor:
    """Hong et al. 2024 with the authors' constants: s 1/2, beta 0.1, T 1000."""
    w, l, _, _ = (s / ELEMENTS for s in squares(n))  # noqa: E741
    lead = 0.5 * w / (torch.exp(0.5 * w) - 1) - 0.5 * l / (torch.exp(0.5 * l) - 1)
    return (w + 0.1 * minus_log_sigmoid(1000 * lead)).mean()


def flow_dpo(n: Noised) -> Tensor:
    """Liu et al. 2025 (2501.13918), constant beta: -log sigmoid(-beta/2 (|v_w - v|^2 - ...)), sums of squares."""
    w, l, ref_w, ref_l = squares(n)  # noqa: E741
    return minus_log_sigmoid(-(BETA / ELEMENTS) / 2 * ((w - ref_w) - (l - ref_l))).mean()


def flow_dpo_on_noise(n: Noised) -> Tensor:
    """The same with beta_t = beta (1 - t)^2, which is a constant beta on the noise: noise = velocity + clean latents."""
    w, l, ref_w, ref_l = squares(n)  # noqa: E741
    return minus_log_sigmoid(-(BETA / ELEMENTS) / 2 * (1 - n.time) ** 2 * ((w - ref_w) - (l - ref_l))).mean()


def on_noise(policy: LogProbs, reference: LogProbs) -> Tensor:
    """Ours with the errors weighted to the noise's before they become log-probs."""
    weight = (1 - noised(flow=True).time.float()) ** 2

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
    """One of our objectives, the calculation it must equal, and whether the targets are velocities."""

    objective: str
    peer: str
    ours: Callable[[Noised], Tensor]
    theirs: Callable[[Noised], Tensor]
    flow: bool = False


FORMULAS = [
    Formula("sigmoid on images", "Diffusion-DPO, with its 1/2", ours(sigmoid), diffusion_dpo),
    Formula("sigmoid on images", "diffusers' script, half the beta", ours(sigmoid), diffusers_dpo),
    Formula("kto on images", "Diffusion-KTO", ours(with_own_z), diffusion_kto),
    Formula("mapo", "MaPO", ours(lambda policy, _: objectives.mapo(policy)), mapo),
    Formula("sigmoid on velocities", "Flow-DPO, constant beta", ours(sigmoid), flow_dpo, flow=True),
    Formula(
        "sigmoid on velocities, noise-weighted", "Flow-DPO, beta (1 - t)^2", ours(on_noise), flow_dpo_on_noise, True
    ),
]


def difference(formula: Formula) -> tuple[float, float]:
    """Of the values, relative above 1, and of the gradients by both predictions, relative."""
    found = []
    for loss in (formula.ours, formula.theirs):
        n = noised(flow=formula.flow)
        n.chosen.requires_grad_()
        n.rejected.requires_grad_()
        value = loss(n)
        found.append((value.item(), torch.cat(torch.autograd.grad(value, (n.chosen, n.rejected)))))
    (one, gradient), (other, wanted) = found
    return abs(one - other) / max(1.0, abs(other)), ((gradient - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.peer)
def test_ours_is_the_papers(formula: Formula) -> None:
    value, gradient = difference(formula)
    assert value <= 1e-5
    assert gradient <= 1e-4


def test_the_half_matters() -> None:
    """The same beta in the authors' convention and in the diffusers script's are different losses."""
    n = noised()
    doubled = ours(lambda p, r: objectives.sigmoid(p, r, beta=2 * BETA))(n)
    assert doubled.item() != pytest.approx(diffusers_dpo(n).item(), abs=1e-3)
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squares(n))  # noqa: E741
    assert doubled.item() == pytest.approx(
        minus_log_sigmoid(BETA * ((ref_w - ref_l) - (w - l))).mean().item(), abs=1e-5
    )


def test_kto_pairs_have_a_z_above_zero() -> None:
    """Guards the comparison: a z that is held at 0 would hide it."""
    n = noised()
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squares(n))  # noqa: E741
    rewards = -0.5 * BETA * torch.cat([w - ref_w, l - ref_l])
    assert rewards.mean() > 0.05 and rewards.min() < -0.05
    delta = rewards[:PAIRS] - rewards[PAIRS:]
    assert delta.min() < -0.05 and delta.max() > 0.05


def test_a_velocity_error_is_a_noise_error_by_time() -> None:
    """x_t = (1 - t) x0 + t e, v = e - x0, so e = x_t + (1 - t) v: what makes the two weightings one identity."""
    n, flow = noised(flow=True), torch.linspace(0.1, 0.9, PAIRS, dtype=torch.float64)[:, None, None, None]
    noise = torch.randn(PAIRS, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    latents = noise - n.target_chosen
    mixed = (1 - flow) * latents + flow * noise
    predicted = mixed + (1 - flow) * n.chosen
    assert torch.allclose(predicted - noise, (1 - flow) * (n.chosen - n.target_chosen))


def test_beta_in_the_authors_units() -> None:
    """A mean-reduced 5000 is a sum-reduced 0.305 on 4x64x64, 0.076 on 4x128x128, 0.019 on 16x128x128."""
    for shape, wanted in (((4, 64, 64), 0.305), ((4, 128, 128), 0.076), ((16, 128, 128), 0.019)):
        assert 5000 / math.prod(shape) == pytest.approx(wanted, abs=5e-4)


def test_shared_noise_cancels_what_both_sides_share() -> None:
    """Mutation that it catches: a delta that isn't relative to the reference."""
    n = noised()
    made: list[Tensor] = []
    ours(lambda policy, reference: made.append(deltas(policy, reference)) or sigmoid(policy, reference))(n)
    w, l, ref_w, ref_l = (s / ELEMENTS for s in squares(n))  # noqa: E741
    assert made[0].tolist() == pytest.approx((-0.5 * ((w - ref_w) - (l - ref_l))).tolist(), abs=1e-6)


def test_the_table_has_them() -> None:
    written = {(row["objective"], row["peer"]) for row in json.loads(TABLE.read_text())["rows"]}
    assert {(f.objective, f.peer) for f in FORMULAS} <= written and len(FORMULAS) == 6
