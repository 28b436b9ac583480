"""Every objective against plain-float arithmetic, and properties that all of them share.

Stated mutations: a flipped sign, a dropped 1/2 or a swapped side in any objective fails
`test_objective_matches_hand_arithmetic`. Its pairs have log-ratios of either sign, different lengths and no symmetry.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_mm import objectives
from dpo_mm.objectives import (
    BATCH_INPUTS,
    DATASET_INPUTS,
    DIVERGENCES,
    MPO,
    OBJECTIVES,
    SUPPORTS_DIVERGENCE,
    LogProbs,
    apply_divergence,
    deltas,
    keyword_settings,
    log_ratios,
    mixture,
    takes,
)

LN2 = math.log(2)


def test_sigmoid_one_pair_by_hand() -> None:
    """One pair, number by number, with beta 0.5.

    | | chosen | rejected |
    |---|---|---|
    | log p under the policy | -10 | -13 |
    | log p under the reference | -13 | -14 |
    | log-ratio r | -10 + 13 = 3 | -13 + 14 = 1 |

    delta = r_w - r_l = 3 - 1 = 2, so the reward margin is beta * delta = 0.5 * 2 = 1.
    sigmoid(1) = 1 / (1 + e^-1) = 1 / 1.367879 = 0.731059, and the loss is -log 0.731059 = 0.313262.

    With label_smoothing 0.1: sigmoid(-1) = 1 - 0.731059 = 0.268941, and -log 0.268941 = 1.313262.
    The loss is 0.9 * 0.313262 + 0.1 * 1.313262 = 0.281936 + 0.131326 = 0.413262.
    """
    one_token = torch.ones(1)
    policy = LogProbs(torch.tensor([-10.0]), torch.tensor([-13.0]), one_token, one_token, is_likelihood=True)
    reference = LogProbs(torch.tensor([-13.0]), torch.tensor([-14.0]), one_token, one_token, is_likelihood=True)
    assert deltas(policy, reference).tolist() == [2.0]
    assert objectives.sigmoid(policy, reference, beta=0.5).item() == pytest.approx(0.313262, abs=1e-6)
    smoothed = objectives.sigmoid(policy, reference, beta=0.5, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.413262, abs=1e-6)


class Pair(NamedTuple):
    """Log-probs of policy and reference, and number of tokens of each side, as plain floats."""

    w: float
    l: float  # noqa: E741
    ref_w: float
    ref_l: float
    n_w: float
    n_l: float

    @property
    def rw(self) -> float:
        return self.w - self.ref_w

    @property
    def rl(self) -> float:
        return self.l - self.ref_l

    @property
    def delta(self) -> float:
        return self.rw - self.rl

    @property
    def mean_delta(self) -> float:
        return self.rw / self.n_w - self.rl / self.n_l


PAIRS = [
    Pair(-6.0, -9.0, -7.3, -8.6, 4, 7),  # r 1.3 and -0.4: ordered correctly
    Pair(-12.0, -5.0, -10.9, -5.8, 9, 3),  # r -1.1 and 0.8: ordered wrongly
    Pair(-3.5, -4.0, -4.2, -6.5, 2, 5),  # r 0.7 and 2.5: both up, rejected more
]
IMAGES = [Pair(-p.w / -40, -p.l / -40, -p.ref_w / -40, -p.ref_l / -40, 1, 1) for p in PAIRS]


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return math.log(sig(x))


def smooth(x: float, e: float) -> float:
    return -(1 - e) * ls(x) - e * ls(-x)


def exo(x: float, e: float) -> float:
    return sig(x) * (math.log(sig(x)) - math.log(1 - e)) + sig(-x) * (math.log(sig(-x)) - math.log(e))


def odds(log_prob: float) -> float:
    return math.log(math.exp(log_prob) / (1 - math.exp(log_prob)))


def phi(x: float) -> float:
    return x / (math.exp(x) - 1)


def each(formula: Callable[[Pair], float]) -> Callable[[list[Pair]], list[float]]:
    return lambda pairs: [formula(p) for p in pairs]


def aot_by_hand(pairs: list[Pair]) -> list[float]:
    ours, theirs = sorted(p.w - p.l for p in pairs), sorted(p.ref_w - p.ref_l for p in pairs)
    return [smooth(0.3 * (a - b), 0.1) for a, b in zip(ours, theirs, strict=True)]


def aot_unpaired_by_hand(pairs: list[Pair]) -> list[float]:
    chosen, rejected = sorted(p.rw for p in pairs), sorted(p.rl for p in pairs)
    return [smooth(0.3 * (a - b), 0.1) for a, b in zip(chosen, rejected, strict=True)]


def with_data(
    formula: Callable[[Pair, float, float], float], one: list[float], two: list[float] | None = None
) -> Callable[[list[Pair]], list[float]]:
    return lambda pairs: [formula(p, a, b) for p, a, b in zip(pairs, one, two or one, strict=True)]


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective with its settings and inputs, and its expected loss."""

    name: str
    settings: dict[str, float]
    formula: Callable[[list[Pair]], list[float]]
    data: dict[str, list[float] | float] = dataclasses.field(default_factory=dict)
    image: bool = False


P, M, C, D = [0.9, 0.5, 0.2], [2.0, 0.0, 0.7], [0.4, -0.9, 1.6], [-1.2, 0.3, 0.5]
BETA = {"beta": 0.3}
SMOOTH = {"beta": 0.3, "label_smoothing": 0.1}


def symmetric(p: Pair, other: float, crossed: float) -> float:
    m1, m2 = p.rw - p.rl, other - crossed
    contrast = 0.5 * (-ls(0.3 * m1) - ls(0.3 * m2))
    return contrast - ls(0.3 * p.rw) - ls(0.3 * other) + 1e-4 * (m1 - m2) ** 2


def linear_by_hand(p: Pair, beta: float) -> float:
    ew, el, fw, fl = -2 * p.w, -2 * p.l, -2 * p.ref_w, -2 * p.ref_l
    return min(max(0.5 + 0.2 * beta * ((ew - fw) - (el - fl)), 0.1), 0.9) * (ew - el)


def mapo_by_hand(p: Pair) -> float:
    ew, el = -2 * p.w, -2 * p.l
    return ew - 0.1 * ls(10 * (phi(0.5 * ew) - phi(0.5 * el)))


def discopop_by_hand(p: Pair) -> float:
    x, m = 0.3 * p.delta, sig(0.3 * p.delta / 0.05)
    return (1 - m) * -ls(x) + m * math.exp(-x)


CASES = [
    Case("sigmoid", BETA, each(lambda p: -ls(0.3 * p.delta))),
    Case("sigmoid", SMOOTH, each(lambda p: smooth(0.3 * p.delta, 0.1))),
    Case("sigmoid", {"beta": 40}, each(lambda p: -ls(40 * p.delta)), image=True),
    Case("sigmoid_norm", BETA, each(lambda p: -ls(0.3 * p.mean_delta))),
    Case("robust", SMOOTH, each(lambda p: (-0.9 * ls(0.3 * p.delta) + 0.1 * ls(-0.3 * p.delta)) / 0.8)),
    Case("hinge", BETA, each(lambda p: max(0.0, 1 - 0.3 * p.delta))),
    Case("ipo", BETA, each(lambda p: (p.mean_delta - 1 / 0.6) ** 2)),
    Case("exo_pair", BETA, each(lambda p: exo(0.3 * p.delta, 1e-3))),
    Case("dmpo", SMOOTH, each(lambda p: exo(0.3 * p.delta, 0.1))),
    Case("dpop", {"beta": 0.3, "penalty": 5}, each(lambda p: -ls(0.3 * (p.delta - 5 * max(0.0, -p.rw))))),
    Case("discopop", BETA, each(discopop_by_hand)),
    Case("aot", SMOOTH, aot_by_hand),
    Case("aot_unpaired", SMOOTH, aot_unpaired_by_hand),
    Case("soft", BETA, with_data(lambda p, s, _: smooth(0.3 * p.delta, 1 - s), P), {"probability": P}),
    Case(
        "margin",
        {"beta": 0.3, "offset_scale": 0.5},
        with_data(lambda p, m, _: -ls(0.3 * p.delta - 0.5 * m), M),
        {"score_margin": M},
    ),
    Case(
        "kto",
        {"beta": 0.3, "chosen_weight": 1.5, "rejected_weight": 0.7},
        each(lambda p: 1.5 * (1 - sig(0.3 * p.rw - 0.2)) + 0.7 * (1 - sig(0.2 - 0.3 * p.rl))),
        {"z": 0.2},
    ),
    Case("bco_pair", BETA, each(lambda p: -ls(0.3 * p.rw - 0.2) - ls(-(0.3 * p.rl - 0.2))), {"reward_shift": 0.2}),
    Case("nca_pair", BETA, each(lambda p: -ls(0.3 * p.rw) - 0.5 * ls(-0.3 * p.rw) - 0.5 * ls(-0.3 * p.rl))),
    Case("sppo_hard", BETA, each(lambda p: (p.rw - 1 / 0.6) ** 2 + (p.rl + 1 / 0.6) ** 2)),
    Case("apo_zero", BETA, each(lambda p: 1 - sig(0.3 * p.rw) + sig(0.3 * p.rl))),
    Case("apo_down", BETA, each(lambda p: sig(0.3 * p.rw) + 1 - sig(0.3 * p.delta))),
    Case("sdpo", BETA, each(lambda p: -ls(0.3 * p.delta)), {"rejected_gradient_scale": P}),
    Case("linear", {"beta": 5, "floor": 0.1}, each(lambda p: linear_by_hand(p, 5)), image=True),
    Case("linear", {"beta": 400, "floor": 0.1}, each(lambda p: linear_by_hand(p, 400)), image=True),  # both bounds
    Case("mapo", {"train_timesteps": 10}, each(mapo_by_hand), image=True),
    Case("sft", {}, each(lambda p: -p.w / p.n_w)),
    Case("sft", {}, each(lambda p: -2 * p.w), image=True),
    Case("orpo", {}, each(lambda p: -p.w / p.n_w - 0.1 * ls(odds(p.w / p.n_w) - odds(p.l / p.n_l)))),
    Case("simpo", {"beta": 2.5}, each(lambda p: -ls(2.5 * (p.w / p.n_w - p.l / p.n_l) - 1.375))),
    Case("simpo", {"beta": 40}, each(lambda p: -ls(40 * (p.w - p.l) - 1.375)), image=True),
    Case("cpo", SMOOTH, each(lambda p: smooth(0.3 * (p.w - p.l), 0.1) - p.w / p.n_w)),
    Case("anchor", {"beta": 0.3, "anchor_shift": 0.4}, each(lambda p: -ls(0.3 * p.rw - 0.4))),
    Case("image_conditional", BETA, with_data(lambda p, c, _: -ls(0.3 * (p.rw - c)), C), {"corrupted_ratio": C}),
    Case("symmetric_image", BETA, with_data(symmetric, C, D), {"other_ratio": C, "crossed_ratio": D}),
    Case(
        "tdpo",
        BETA,
        with_data(lambda p, a, b: -ls(0.3 * p.delta - 0.5 * 0.3 * (b - a)), C, D),
        {"kl_chosen": C, "kl_rejected": D},
    ),
]


def build(pairs: list[Pair], *, image: bool = False, dtype: torch.dtype = torch.float64) -> tuple[LogProbs, LogProbs]:
    w, l, ref_w, ref_l, n_w, n_l = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))  # noqa: E741
    return LogProbs(w, l, n_w, n_l, is_likelihood=not image), LogProbs(ref_w, ref_l, n_w, n_l, is_likelihood=not image)


def call(case: Case, policy: LogProbs, reference: LogProbs) -> Tensor:
    given = {"reference_logps": reference} if takes(case.name, "reference_logps") else {}
    data = {key: torch.tensor(value, dtype=policy.chosen.dtype) for key, value in case.data.items()}
    return OBJECTIVES[case.name](policy, **given, **data, **case.settings)


def label(case: Case) -> str:
    return f"{case.name}{'-image' if case.image else ''}{'-smoothed' if 'label_smoothing' in case.settings else ''}"


def first_case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_cases_cover_every_objective() -> None:
    assert {case.name for case in CASES} == set(OBJECTIVES)
    assert (len(OBJECTIVES), len(CASES)) == (30, 35)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_objective_matches_hand_arithmetic(case: Case) -> None:
    pairs = IMAGES if case.image else PAIRS
    loss = call(case, *build(pairs, image=case.image))
    assert loss.shape == (3,)
    assert loss.tolist() == pytest.approx(case.formula(pairs), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_objective_swapped_sides_changes_the_loss(case: Case) -> None:
    """Check of `test_objective_matches_hand_arithmetic` itself: it can detect swapped sides."""
    pairs = IMAGES if case.image else PAIRS
    swapped = [Pair(p.l, p.w, p.ref_l, p.ref_w, p.n_l, p.n_w) for p in pairs]
    ours, turned = (call(case, *build(some, image=case.image)) for some in (pairs, swapped))
    assert (ours - turned).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=label)
def test_objective_single_pair_equals_its_loss_in_the_batch(case: Case) -> None:
    """Mutation that it catches: a mean over the batch before the loss, which couples pairs. AOT sorts the batch by design."""
    pairs = IMAGES if case.image else PAIRS
    if case.name.startswith("aot"):
        alone = call(case, *build(pairs[:1]))
        assert alone.item() == pytest.approx(smooth(0.3 * pairs[0].delta, 0.1))
        return
    whole = call(case, *build(pairs, image=case.image))
    for n, pair in enumerate(pairs):
        data = {key: value[n : n + 1] if isinstance(value, list) else value for key, value in case.data.items()}
        alone = call(dataclasses.replace(case, data=data), *build([pair], image=case.image))
        assert alone.item() == pytest.approx(whole[n].item(), rel=1e-12)


EQUAL = {
    **dict.fromkeys(
        ("sigmoid", "sigmoid_norm", "robust", "dpop", "aot", "aot_unpaired", "soft", "margin", "sdpo", "anchor"), LN2
    ),
    **dict.fromkeys(("image_conditional", "tdpo"), LN2),
    "hinge": 1.0,
    "ipo": (1 / 0.6) ** 2,
    "exo_pair": exo(0, 1e-3),
    "dmpo": exo(0, 1e-3),
    "discopop": (LN2 + 1) / 2,
    "kto": 1.0,
    "bco_pair": 2 * LN2,
    "nca_pair": 2 * LN2,
    "sppo_hard": 2 * (1 / 0.6) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "symmetric_image": 3 * LN2,
}
NEUTRAL = {"probability": 1.0, "rejected_gradient_scale": 1.0}
"""Neutral values of inputs. The others are 0."""


def test_objective_policy_equal_to_reference_returns_its_neutral_value() -> None:
    """ln 2 for logistic objectives, for text and images, in float32 to the last digit."""
    assert set(EQUAL) == {name for name in OBJECTIVES if takes(name, "reference_logps")} - {"linear"}
    for name, value in EQUAL.items():
        for pairs, image in ((PAIRS, False), (IMAGES, True)):
            _, reference = build(pairs, image=image, dtype=torch.float32)
            data = {
                k: torch.full((3,), NEUTRAL.get(k, 0.0)) for k in (*DATASET_INPUTS, *BATCH_INPUTS) if takes(name, k)
            }
            loss = OBJECTIVES[name](reference, reference, beta=0.3, **data)
            assert loss.tolist() == pytest.approx([value] * 3, rel=3e-7), name


SIDES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4)


@given(SIDES)
def test_deltas_swapped_sides_are_negated_exactly(values: list[float]) -> None:
    """Mutation that it catches: a delta summed in another order for the rejected side."""
    a, b, c, d = (torch.tensor([v]) for v in values)
    one = torch.ones(1)
    policy, reference = LogProbs(a, b, one, one, is_likelihood=True), LogProbs(c, d, one, one, is_likelihood=True)
    turned = LogProbs(b, a, one, one, is_likelihood=True), LogProbs(d, c, one, one, is_likelihood=True)
    assert torch.equal(deltas(policy, reference), -deltas(*turned))
    assert torch.equal(deltas(policy, policy), torch.zeros(1))
    assert log_ratios(policy, reference) == log_ratios(*turned)[::-1]
    logit = 0.3 * deltas(policy, reference)
    assert torch.equal(objectives.sigmoid(*turned, beta=0.3), -torch.nn.functional.logsigmoid(-logit))


FALLING = [name for name in OBJECTIVES if name not in ("exo_pair", "dmpo", "discopop", "ipo", "soft", "nca_pair")]
FALLING = [name for name in FALLING if name not in ("sppo_hard", "apo_down", "linear", "symmetric_image")]


def test_twenty_objectives_are_monotone() -> None:
    assert len(FALLING) == 20


@pytest.mark.parametrize("name", FALLING)
@given(step=st.floats(1e-3, 5))
def test_objective_likelier_chosen_never_costs_more(name: str, step: float) -> None:
    """A likelier chosen side never costs more, a likelier rejected side never less. The others are not monotone by design."""
    case = first_case(name)
    pairs = IMAGES if case.image else PAIRS
    step = step * 0.01 if case.image else min(step, 3.4)
    plain = call(case, *build(pairs, image=case.image)).sum()
    better = [p._replace(w=p.w + step) for p in pairs]
    worse = [p._replace(l=p.l + step) for p in pairs]
    assert call(case, *build(better, image=case.image)).sum() <= plain
    assert call(case, *build(worse, image=case.image)).sum() >= plain


def extreme(name: str, values: list[float], dtype: torch.dtype, beta: float) -> tuple[LogProbs, Callable[..., Tensor]]:
    """A policy whose log-probs are leaves, and its objective, with inputs of up to 1e4."""
    case = first_case(name)
    w, l, c, d = (torch.tensor([v, -v, v], dtype=dtype) for v in values)  # noqa: E741
    policy = LogProbs(
        w.requires_grad_(), l.requires_grad_(), c.new_ones(3), c.new_ones(3), is_likelihood=not case.image
    )
    reference = LogProbs(
        torch.zeros_like(c), torch.zeros_like(c), policy.num_tokens_chosen, policy.num_tokens_rejected, True
    )
    given = {"reference_logps": reference} if takes(name, "reference_logps") else {}
    given |= {k: c for k in ("corrupted_ratio", "other_ratio", "kl_rejected", "reward_shift", "z") if takes(name, k)}
    given |= {k: d for k in ("crossed_ratio", "kl_chosen", "score_margin") if takes(name, k)}
    given |= {k: torch.full_like(c, 0.5) for k in ("probability", "rejected_gradient_scale") if takes(name, k)}
    chosen = {k: v for k, v in case.settings.items() if k != "beta"} | (
        {"beta": beta} if "beta" in keyword_settings(name) else {}
    )
    return policy, lambda: OBJECTIVES[name](policy, **given, **chosen)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)  # a deadline in wall time fails on a busy machine
@given(values=SIDES, dtype=st.sampled_from([torch.float32, torch.bfloat16]), beta=st.sampled_from([0.1, 5000.0]))
def test_objective_extreme_log_ratios_stay_finite(
    name: str, values: list[float], dtype: torch.dtype, beta: float
) -> None:
    check_finite(name, values, dtype, beta)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objective_corner_log_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    for w in (-1e4, 0.0, 1e4):
        for other in (-1e4, 0.0, 1e4):
            for beta in (0.1, 5000.0):
                check_finite(name, [w, other, -w, 1e4], dtype, beta)


def check_finite(name: str, values: list[float], dtype: torch.dtype, beta: float) -> None:
    policy, objective = extreme(name, values, dtype, beta)
    loss = objective()
    assert loss.dtype == dtype and torch.isfinite(loss).all()
    loss.sum().backward()
    for side in (policy.chosen, policy.rejected):
        assert side.grad is None or torch.isfinite(side.grad).all()


@pytest.mark.parametrize("name", SUPPORTS_DIVERGENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_extreme_log_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    case = first_case(name)
    data = {k: torch.tensor([0.5], dtype=dtype) for k in DATASET_INPUTS}
    assert len(DIVERGENCES) == 4
    for divergence in DIVERGENCES:
        for alpha in (-1.0, 0.5, 1.0, 2.0):
            loss = mixture({name: 1.0}, case.settings, divergence=divergence, divergence_alpha=alpha)
            for w, l in ((1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, 0.0)):  # noqa: E741
                sides = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in (w, l)]
                one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
                losses = loss(
                    LogProbs(*sides, one, one, is_likelihood=True),
                    LogProbs(zero, zero, one, one, is_likelihood=True),
                    data,
                )
                losses.sum().backward()
                assert torch.isfinite(losses).all()
                assert all(torch.isfinite(side.grad).all() for side in sides)


def test_divergence_matches_hand_arithmetic() -> None:
    """Mutations that it catches: the sign in forward KL's exponent, alpha instead of 1 - alpha."""
    formulas: dict[str, Callable[[float], float]] = {
        "reverse_kl": lambda r: r,
        "forward_kl": lambda r: 1 - math.exp(-r),
        "js": lambda r: math.log(2 * math.exp(r) / (math.exp(r) + 1)),
        "alpha": lambda r: (math.exp(-0.7 * r) - 1) / -0.7,
    }
    assert set(formulas) == set(DIVERGENCES)
    policy, reference = build(PAIRS)
    for name, f in formulas.items():
        scores = log_ratios(*apply_divergence(policy, reference, divergence=name, alpha=0.3))
        assert scores[0].tolist() == pytest.approx([f(p.rw) for p in PAIRS], rel=1e-12)
        assert scores[1].tolist() == pytest.approx([f(p.rl) for p in PAIRS], rel=1e-12)
        loss = mixture({"hinge": 1.0, "sft": 0.5}, BETA, divergence=name, divergence_alpha=0.3)(policy, reference, {})
        expected = [max(0.0, 1 - 0.3 * (f(p.rw) - f(p.rl))) - 0.5 * p.w / p.n_w for p in PAIRS]
        assert loss.tolist() == pytest.approx(expected, rel=1e-12)
        assert deltas(*apply_divergence(policy, policy, divergence=name)).tolist() == [0, 0, 0]
    assert all(name in OBJECTIVES for name in SUPPORTS_DIVERGENCE) and len(SUPPORTS_DIVERGENCE) == 10


def test_divergence_above_e_to_the_30_is_a_straight_line() -> None:
    """Mutation that it catches: a clamp, which would stop the gradient."""
    ratio = torch.tensor([-33.0], dtype=torch.float64, requires_grad=True)
    for name, alpha, f, slope in (
        ("forward_kl", 0.5, 1 - 4 * math.exp(30), math.exp(30)),
        ("alpha", -1.0, (math.exp(30) * 37 - 1) / -2, math.exp(30)),
    ):
        score = DIVERGENCES[name](ratio, alpha)
        assert score.item() == pytest.approx(f, rel=1e-12)
        assert torch.autograd.grad(score.sum(), ratio)[0].item() == pytest.approx(slope, rel=1e-12)


def test_objective_defaults_are_the_published_values() -> None:
    expected = {
        "sigmoid": {"label_smoothing": 0.0},
        "robust": {"label_smoothing": 0.1},
        "exo_pair": {"label_smoothing": 1e-3},
        "dmpo": {"label_smoothing": 1e-3},
        "dpop": {"penalty": 50.0},
        "discopop": {"temperature": 0.05},
        "aot": {"label_smoothing": 0.0},
        "aot_unpaired": {"label_smoothing": 0.0},
        "margin": {"offset_scale": 1.0},
        "kto": {"chosen_weight": 1.0, "rejected_weight": 1.0},
        "mapo": {"ratio_weight": 0.1, "error_scale": 0.5, "train_timesteps": 1000},
        "orpo": {"ratio_weight": 0.1},
        "simpo": {"target_margin": 1.375, "label_smoothing": 0.0},
        "cpo": {"nll_weight": 1.0, "label_smoothing": 0.0},
        "anchor": {"anchor_shift": 0.0},
        "symmetric_image": {"contrast_weight": 0.5, "closeness_weight": 1e-4},
        "tdpo": {"kl_weight": 0.5},
    }
    signature_defaults = {
        n: {k: p.default for k, p in keyword_settings(n).items() if p.default is not p.empty} for n in OBJECTIVES
    }
    assert {name: defaults for name, defaults in signature_defaults.items() if defaults} == expected
    defaults = [
        inspect.signature(f).parameters[k].default
        for f, k in ((apply_divergence, "alpha"), (mixture, "divergence_alpha"))
    ]
    assert defaults == [0.5, 0.5]
    assert inspect.signature(objectives.segment_mean).parameters["edited_token_weight"].default == 5
    assert inspect.signature(objectives.bco_shift).parameters["previous_mean"].default == 0


def test_log_probs_detach_keeps_numbers_and_drops_gradient() -> None:
    policy, _ = build(PAIRS)
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    detached = policy.detach()
    for field in dataclasses.fields(LogProbs):
        one, other = getattr(policy, field.name), getattr(detached, field.name)
        assert one is other or (torch.equal(one, other) and not other.requires_grad)


def test_kto_reference_and_bco_shift_match_hand_arithmetic() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    assert objectives.kto_reference(chosen, rejected, beta=0.3).item() == 0  # the mean is -0.375, clamped to 0
    assert objectives.kto_reference(chosen, -rejected, beta=0.3).item() == pytest.approx(0.3 * 3.5 / 4)
    first = objectives.bco_shift(chosen, rejected, beta=0.3)
    assert first.item() == pytest.approx(0.3 * -1.5 / 4)  # may be negative
    second = objectives.bco_shift(
        torch.tensor([4.0]), torch.tensor([6.0]), beta=0.3, previous_mean=first, previous_count=4
    )
    assert second.item() == pytest.approx(0.3 * (-1.5 + 10) / 6)
    moving = torch.tensor([1.0], requires_grad=True)
    assert not objectives.kto_reference(moving, moving, beta=1).requires_grad
    assert not objectives.bco_shift(moving, moving, beta=1).requires_grad


def test_sdpo_scales_only_the_rejected_gradient() -> None:
    """Mutation that it catches: scaling the loss, or the chosen side."""
    plain, scaled = (build(PAIRS)[0] for _ in range(2))
    reference = build(PAIRS)[1]
    for policy in (plain, scaled):
        policy.chosen.requires_grad_()
        policy.rejected.requires_grad_()
    scale = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    loss = objectives.sdpo(scaled, reference, beta=0.3, rejected_gradient_scale=scale)
    assert torch.equal(loss, objectives.sigmoid(plain, reference, beta=0.3))
    loss.sum().backward()
    objectives.sigmoid(plain, reference, beta=0.3).sum().backward()
    assert torch.equal(scaled.chosen.grad, plain.chosen.grad)
    assert torch.allclose(scaled.rejected.grad, scale * plain.rejected.grad)


def test_sdpo_lambda_image_is_computed_per_pair() -> None:
    """The authors' code takes one scale per micro-batch, so that a pair's scale changes with its neighbours."""
    chosen = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    rejected = torch.tensor([[3.0, 4.0], [-1.0, 5.0], [1.0, 2.0], [1.0, 1.0]])
    scale = objectives.sdpo_lambda_image(chosen, rejected, slack=0.1)
    assert scale.tolist() == pytest.approx([0.9 * 5 / 11, 1.0, 0.09, 1.0])
    alone = [objectives.sdpo_lambda_image(chosen[n : n + 1], rejected[n : n + 1], slack=0.1).item() for n in range(4)]
    assert alone == scale.tolist()
    assert torch.allclose(objectives.sdpo_lambda_image(7 * chosen, 7 * rejected, slack=0.1), scale)
    generator = torch.Generator().manual_seed(0)
    g_w = torch.randn(200, 4, 8, generator=generator)
    g_l = g_w + torch.randn(200, 4, 8, generator=generator)
    step = g_w - objectives.sdpo_lambda_image(g_w, g_l, slack=0.0)[:, None, None] * g_l
    assert ((step * g_w).flatten(1).sum(1) >= -1e-4).all()  # the chosen error does not rise, to first order
    assert (((g_w - g_l) * g_w).flatten(1).sum(1) < -1e-4).any()  # unscaled it would


def test_sdpo_lambda_text_matches_autograd_at_the_logits() -> None:
    """Responses "a b c" and "a b d e" over a vocabulary of five: gradients by autograd at each context's own logits.

    Mutations that it catches: continuing past the first difference, counting padding, the sign at the first difference.
    """
    generator = torch.Generator().manual_seed(0)
    prefix, after = torch.randn(3, 5, generator=generator), torch.randn(1, 5, generator=generator)
    shared, own = prefix.clone().requires_grad_(), after.clone().requires_grad_()
    lp, lp_own = shared.log_softmax(1), own.log_softmax(1)
    chosen, rejected = lp[0, 0] + lp[1, 1] + lp[2, 2], lp[0, 0] + lp[1, 1] + lp[2, 3] + lp_own[0, 4]
    tokens = (
        torch.stack([lp[0, 0], lp[1, 1], lp[2, 2]])[None],
        torch.stack([lp[0, 0], lp[1, 1], lp[2, 3], lp_own[0, 4]])[None],
    )
    g_w = torch.autograd.grad(chosen, shared, retain_graph=True)[0]
    g_l = torch.autograd.grad(rejected, shared, retain_graph=True)[0]
    held = torch.zeros(3, 5)
    held[0, 0] = held[1, 1] = held[2, 2] = held[2, 3] = 1
    inner, square = (g_w * g_l * held).sum(), (g_w * g_w * held).sum()
    masks = (torch.ones(1, 3), torch.ones(1, 4))
    ids = (torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 3, 4]]))
    for slack in (0.5, 0.9):
        scale = objectives.sdpo_lambda_text(tokens, masks, ids, slack=slack)
        assert scale.item() == pytest.approx(((1 - slack) * square / inner).clamp(0, 1).item(), rel=1e-5)
    assert not scale.requires_grad and 0 < scale < 1
    padded = [torch.nn.functional.pad(part, (0, 2)) for part in (*tokens, *masks, *ids)]
    again = objectives.sdpo_lambda_text(
        (padded[0], padded[1]), (padded[2], padded[3]), (padded[4], padded[5]), slack=0.9
    )
    assert torch.equal(again, scale)
    apart = (torch.tensor([[3, 1, 2]]), ids[1])
    assert objectives.sdpo_lambda_text(tokens, masks, apart, slack=0.9).item() == 1


def test_sdpo_lambda_text_counts_the_chosen_tokens_past_the_rejected_ones() -> None:
    """|g_w|^2 is over all tokens of chosen, by hand. It catches a tail of chosen, or its padding, that is left out or in.

    Chosen a b c and rejected a, after which rejected is padding: the product is over token a alone.
    """
    p_w, p_l = torch.tensor([[0.5, 0.6, 0.7, 0.3]]), torch.tensor([[0.5, 0.9]])
    masks = (torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 0]]))
    ids = (torch.tensor([[1, 2, 3, 0]]), torch.tensor([[1, 0]]))
    scale = objectives.sdpo_lambda_text((p_w.log(), p_l.log()), masks, ids, slack=0.7)
    assert scale.item() == pytest.approx(0.3 * (0.5**2 + 0.4**2 + 0.3**2) / (0.5 * 0.5))


def test_tdpo_has_the_gradient_of_the_rejected_kl_alone() -> None:
    """d loss / d KL_l = alpha * beta * s(-logit), by hand. It catches a chosen KL with gradient."""
    policy, reference = build(PAIRS)
    kl_chosen = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    kl_rejected = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64, requires_grad=True)
    loss = objectives.tdpo(policy, reference, beta=0.3, kl_chosen=kl_chosen, kl_rejected=kl_rejected, kl_weight=0.5)
    loss.sum().backward()
    logit = 0.3 * (deltas(policy, reference) - 0.5 * (kl_rejected - kl_chosen)).detach()
    assert kl_chosen.grad is None
    assert kl_rejected.grad is not None and torch.allclose(kl_rejected.grad, 0.5 * 0.3 * torch.sigmoid(-logit))


def test_linear_weight_has_no_gradient() -> None:
    policy, reference = build(IMAGES, image=True)
    policy.chosen.requires_grad_()
    objectives.linear(policy, reference, beta=0.5, floor=0.1).sum().backward()
    weights = [0.5 + 0.2 * 0.5 * -2 * p.delta for p in IMAGES]
    assert policy.chosen.grad.tolist() == pytest.approx([-2 * w for w in weights])


def test_mapo_over_expm1_is_exact_near_zero_and_far_away() -> None:
    """x / (e^x - 1) has no overflow, no jump where the series begins, and slope -1/2 at 0."""
    from dpo_mm.objectives.denoising import _over_expm1

    x = torch.tensor([1e-9, 9.99e-4, 1.001e-3, 0.5, 80.0, -0.5], dtype=torch.float64, requires_grad=True)
    expected = [v / math.expm1(v) for v in x.tolist()]
    assert _over_expm1(x).tolist() == pytest.approx(expected, rel=1e-12)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert _over_expm1(zero).item() == 1
    _over_expm1(x).sum().backward()
    assert x.grad[0].item() == pytest.approx(-0.5, abs=1e-6)


TOKENS = [[-1.0, -2.0, -3.0, -4.0, -9.0], [-0.75, -5.0, -7.0, -7.0, -7.0]]
MASK = [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


def test_token_functions_match_hand_arithmetic() -> None:
    """Mutations that it catches: counting the prompt's tokens, or the tail of the longer side."""
    tokens, mask = torch.tensor(TOKENS), torch.tensor(MASK)
    swapped, turned = tokens.flip(0), mask.flip(0)
    chosen, rejected = objectives.shared_length(tokens, swapped, mask, turned, ld_alpha=0.25)
    assert chosen.tolist() == [-2 - 0.25 * 3 - 0.25 * 4, -0.75]
    assert rejected.tolist() == [-0.75, -2 - 0.25 * 3 - 0.25 * 4]
    plain = objectives.shared_length(tokens, swapped, mask, turned, ld_alpha=1.0)[0]
    assert plain.tolist() == [-9.0, -0.75]
    edited = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert objectives.segment_mean(tokens, mask, edited).tolist() == pytest.approx([(-5 * 2 - 3 - 4) / 7, -0.75])
    collision = torch.full((2, 5), -1.0)
    weight = objectives.on_policy_weight(tokens.requires_grad_(), mask, collision)
    assert weight.tolist() == pytest.approx([math.exp(-3 + 1), math.exp(-0.75 + 1)])
    assert not weight.requires_grad
    hidden = tokens.detach().masked_fill(mask == 0, -torch.inf)  # values outside the mask are never read
    assert objectives.segment_mean(hidden, mask, edited).isfinite().all()
    assert objectives.on_policy_weight(hidden, mask, collision).tolist() == weight.tolist()
    assert objectives.shared_length(hidden, swapped, mask, turned, ld_alpha=0.25)[0].tolist() == chosen.tolist()


def test_mixture_is_the_weighted_sum() -> None:
    policy, reference = build(PAIRS)
    loss = mixture(MPO, BETA)(policy, reference, {"reward_shift": torch.tensor(0.2)})
    expected = [
        0.8 * -ls(0.3 * p.delta) + 0.2 * (-ls(0.3 * p.rw - 0.2) - ls(0.2 - 0.3 * p.rl)) - p.w / p.n_w for p in PAIRS
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert MPO == {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    alone = mixture({"sft": 2.0}, {})(policy, None, {})
    assert alone.tolist() == pytest.approx([-2 * p.w / p.n_w for p in PAIRS])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "beta" in keyword_settings(name)])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_objective_beta_out_of_range_raises(name: str, beta: float) -> None:
    case = first_case(name)
    with pytest.raises(ValueError, match="beta must be above 0"):
        call(
            dataclasses.replace(case, settings={**case.settings, "beta": beta}),
            *build(IMAGES if case.image else PAIRS, image=case.image),
        )


SMOOTHED = [name for name in OBJECTIVES if "label_smoothing" in keyword_settings(name)]
BAD = [(name, "label_smoothing", value) for name in SMOOTHED for value in (-0.1, 0.5, 1.0)] + [
    ("exo_pair", "label_smoothing", 0.0),
    ("dpop", "penalty", -1.0),
    ("discopop", "temperature", 0.0),
    ("discopop", "temperature", 1.5),
    ("margin", "offset_scale", -1.0),
    ("kto", "chosen_weight", -1.0),
    ("kto", "rejected_weight", -1.0),
    ("linear", "floor", 0.0),
    ("linear", "floor", 0.5),
    ("mapo", "ratio_weight", -1.0),
    ("mapo", "error_scale", 0.0),
    ("mapo", "train_timesteps", 0.0),
    ("orpo", "ratio_weight", -1.0),
    ("simpo", "target_margin", -1.0),
    ("cpo", "nll_weight", -1.0),
    ("symmetric_image", "contrast_weight", -1.0),
    ("symmetric_image", "closeness_weight", -1.0),
    ("tdpo", "kl_weight", -1.0),
]


@pytest.mark.parametrize(("name", "setting", "value"), BAD)
def test_objective_setting_out_of_range_raises(name: str, setting: str, value: float) -> None:
    case = first_case(name)
    with pytest.raises(ValueError, match=f"{setting} must be .*, got {value}"):
        call(
            dataclasses.replace(case, settings={**case.settings, setting: value}),
            *build(IMAGES if case.image else PAIRS, image=case.image),
        )


def test_out_of_range_cases_cover_every_setting() -> None:
    every = {(name, key) for name in OBJECTIVES for key in keyword_settings(name)}
    tested = {(name, setting) for name, setting, _ in BAD} | {
        (n, "beta") for n in OBJECTIVES if "beta" in keyword_settings(n)
    }
    assert every - tested == {("anchor", "anchor_shift")}  # any number is allowed
    assert len(SMOOTHED) == 8 and len(every) == 51


@pytest.mark.parametrize("name", ["linear", "mapo", "orpo"])
def test_objective_of_one_modality_raises_for_the_other(name: str) -> None:
    case = first_case(name)
    with pytest.raises(ValueError, match=f"{name} .*denoising error"):
        call(case, *build(PAIRS, image=not case.image))


def test_token_functions_weight_out_of_range_raises() -> None:
    tokens, mask = torch.tensor(TOKENS), torch.tensor(MASK)
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match="ld_alpha must be in"):
            objectives.shared_length(tokens, tokens, mask, mask, ld_alpha=weight)
    with pytest.raises(ValueError, match="edited_token_weight must be at least 0"):
        objectives.segment_mean(tokens, mask, mask, edited_token_weight=-1)
    with pytest.raises(ValueError, match="slack must be in"):
        objectives.sdpo_lambda_image(tokens, tokens, slack=1.0)


def test_mixture_wrong_arguments_raise_with_the_fix() -> None:
    policy, reference = build(PAIRS)
    for weights, chosen, options, message in (
        ({}, {}, {}, "no objective given"),
        ({"sigmiod": 1.0}, BETA, {}, "objective 'sigmiod' is unknown; did you mean 'sigmoid'"),
        (
            {"sigmoid": 1.0},
            {"beta": 0.1, "smoothin": 0.1},
            {},
            "smoothin: not a setting of sigmoid; .*'label_smoothing'",
        ),
        ({"sigmoid": 1.0}, {}, {}, "'sigmoid' needs the setting 'beta'"),
        ({"linear": 1.0}, BETA, {}, "'linear' needs the setting 'floor'"),
        ({"sigmoid": 1.0, "kto": 1.0}, BETA, {"divergence": "js"}, "divergence 'js' does not go with kto"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(weights, chosen, **options)
    with pytest.raises(ValueError, match=r"divergence 'forward' is unknown; did you mean 'forward_kl'"):
        mixture({"sigmoid": 1.0}, BETA, divergence="forward")(policy, reference, {})
    with pytest.raises(ValueError, match="alpha must be finite"):
        apply_divergence(policy, reference, divergence="alpha", alpha=math.nan)
    for name, key, whose in (("soft", "probability", "the column"), ("kto", "z", "the batch's")):
        with pytest.raises(ValueError, match=f"'{name}' needs {whose} '{key}'"):
            mixture({name: 1.0}, BETA)(policy, reference, {})


def test_objective_arguments_after_the_log_probs_are_keyword_only() -> None:
    """Inputs from the dataset or the batch have no default."""
    given = (*DATASET_INPUTS, *BATCH_INPUTS)
    used = set()
    for name, function in OBJECTIVES.items():
        for key, parameter in inspect.signature(function).parameters.items():
            keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert keyword == (key not in ("policy_logps", "reference_logps")), (name, key)
            assert key not in given or parameter.default is inspect.Parameter.empty, (name, key)
            used.add(key)
    assert set(given) <= used and len(given) == 10


def test_objective_docstrings_have_all_sections() -> None:
    for name, function in OBJECTIVES.items():
        text = inspect.getdoc(function) or ""
        sections = ("Args:", "Returns:", "Source:") + (("Raises:",) if name != "sft" else ())
        assert all(section in text for section in sections) and "(pairs,)" in text, name
    assert sorted(objectives.__all__) == sorted(set(objectives.__all__))
    assert all(hasattr(objectives, name) for name in objectives.__all__)


def test_objectives_page_lists_every_objective() -> None:
    """docs/reference/objectives.md has each name, whether it needs a reference, and its inputs from the batch."""
    page = (Path(__file__).parents[3] / "docs" / "reference" / "objectives.md").read_text()
    rows = {cells[1].strip(" `"): cells for line in page.splitlines() if len(cells := line.split("|")) == 9}
    assert set(rows) - {"name", "---"} == set(OBJECTIVES)
    for name in OBJECTIVES:
        assert (rows[name][4].strip() == "yes") == takes(name, "reference_logps"), name
        needed = {key for key in (*DATASET_INPUTS, *BATCH_INPUTS) if takes(name, key)}
        assert set(re.findall(r"`(\w+)`", rows[name][6])) == needed, name


def test_parity_page_matches_the_measurements() -> None:
    """Written by `python -m tests.bench.numbers`."""
    from tests.bench.numbers import PAGE, page

    assert PAGE.read_text() == page()
