from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.diffusion.collate import collate
from dpo_mm.policies.diffusion.latents import LatentScale
from dpo_mm.training.pair_stream import PairStream


def test_random_draws_depend_only_on_seed_row_epoch_and_purpose() -> None:
    one = random_draws.sample_noise(0, "row", 3, (4, 8, 8))
    assert np.array_equal(one, random_draws.sample_noise(0, "row", 3, (4, 8, 8))) and one.dtype == np.float32
    others = [random_draws.sample_noise(*key, (4, 8, 8)) for key in ((1, "row", 3), (0, "wor", 3), (0, "row", 4))]
    others.append(random_draws.sample_noise(0, "row", 3, (4, 8, 8), purpose="posterior"))
    assert not any(np.array_equal(one, other) for other in others)
    assert (
        random_draws.sample_noise_level(0, "row", 3)
        == random_draws.sample_noise_level(0, "row", 3)
        != random_draws.sample_noise_level(0, "row", 4)
    )


def levels(count: int, **how: Any) -> list[float]:
    return [random_draws.sample_noise_level(0, str(n), 0, **how) for n in range(count)]


def test_sample_noise_is_gaussian_and_levels_are_uniform() -> None:
    noise = np.concatenate([random_draws.sample_noise(0, str(n), 0, (4, 8, 8)).ravel() for n in range(40)])
    assert stats.kstest(noise, "norm").pvalue > 0.001
    uniform = levels(2000, level_range=(0.2, 0.7))
    assert stats.kstest(uniform, "uniform", args=(0.2, 0.5)).pvalue > 0.001
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.08


def test_logit_normal_levels_are_a_normal_truncated_to_the_range() -> None:
    """Mutation that it catches: clipping to the range, which would pile up levels at its ends."""
    whole = np.array(levels(2000, distribution="logit_normal"))
    assert stats.kstest(np.log(whole / (1 - whole)), "norm").pvalue > 0.001
    truncated = np.array(levels(2000, distribution="logit_normal", level_range=(0.3, 0.9)))
    ends = [math.log(end / (1 - end)) for end in (0.3, 0.9)]
    assert stats.kstest(np.log(truncated / (1 - truncated)), "truncnorm", args=tuple(ends)).pvalue > 0.001
    assert truncated.min() >= 0.3 and truncated.max() < 0.9


@pytest.mark.parametrize("kind", random_draws.TIMESTEP_DISTRIBUTIONS)
def test_sample_noise_level_stratum_stays_in_its_part_of_the_distribution(kind: str) -> None:
    edges = [random_draws.TIMESTEP_DISTRIBUTIONS[kind](n / 8, 0.1, 0.9) for n in range(9)]
    for index in range(8):
        sampled = levels(50, distribution=kind, level_range=(0.1, 0.9), stratum=(index, 8))
        assert all(edges[index] <= level < edges[index + 1] for level in sampled)
    assert [random_draws.TIMESTEP_DISTRIBUTIONS[kind](u, 0.1, 0.9) for u in (0.0, 1.0)] == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("kind", random_draws.TIMESTEP_DISTRIBUTIONS)
def test_sample_noise_level_stays_below_the_high_end_despite_rounding(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(9 + u) / 10 rounds to 1 for the largest u below 1. It catches a level of 1, which is past the last timestep."""
    largest = SimpleNamespace(uniform=lambda: math.nextafter(1.0, 0.0))
    monkeypatch.setattr(random_draws, "row_generator", lambda *key: largest)
    for low, high in ((0.0, 1.0), (0.2, 0.7)):
        level = random_draws.sample_noise_level(0, "a", 0, distribution=kind, level_range=(low, high), stratum=(9, 10))
        assert high - 1e-9 < level < high


def test_collate_negates_the_noise_of_a_mirrored_row_and_nothing_else() -> None:
    """It catches a sign that does not reach the noise: the pair of draws would be one draw twice."""
    ones = torch.ones(2, 4, 4)
    row = {"id": "a", "visit": 0, "prompt": {"e": torch.zeros(1)}}
    row |= {f"{side}_{name}": ones for side in ("chosen", "rejected") for name in ("mean", "std")}
    policy: Any = SimpleNamespace(
        config=TrainConfig("m", "p", "o"),
        noise_process=SimpleNamespace(timesteps=lambda levels, tokens: levels),
        latent_scale=LatentScale(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)),
        num_tokens=lambda shape: 1,
        conditioning_columns=(),
        cuts_prompts=False,
    )
    batch = collate(policy, [{**row, "sign": 1}, {**row, "sign": -1}, row])
    assert torch.equal(batch["noise"][1], -batch["noise"][0]) and torch.equal(batch["noise"][2], batch["noise"][0])
    for name in ("chosen", "rejected", "level"):
        assert torch.equal(batch[name][0], batch[name][1])


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"row-{n}"} for n in range(count)]


def steps(stream: PairStream, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(stream), size):
        yield [stream[n] for n in range(start, start + size)]


def test_pair_stream_step_uses_every_stratum_once_in_a_new_order() -> None:
    stream = PairStream(rows(10), seed=0, length=80, num_strata=8)
    strata = [[row["stratum"] for row in step] for step in steps(stream, 8)]
    assert all(sorted(step) == [(n, 8) for n in range(8)] for step in strata)
    assert len({tuple(step) for step in strata}) == 10
    again = PairStream(
        rows(10), seed=0, length=800, num_strata=8
    )  # a longer run, read in the middle as when it resumes
    assert [again[n]["stratum"] for n in (17, 63)] == [stream[n]["stratum"] for n in (17, 63)]


def test_pair_stream_fixed_draws_are_stratified_per_row() -> None:
    """The K draws of a row cover the schedule, in a different order per row, so that an epoch covers it too."""
    stream = PairStream(rows(40), seed=0, length=160, num_fixed_draws=4, num_strata=8)
    strata: dict[str, list[tuple[int, int]]] = {}
    for n in range(len(stream)):
        strata.setdefault(stream[n]["id"], []).append(stream[n]["stratum"])
    assert all(sorted(of_row) == [(n, 4) for n in range(4)] for of_row in strata.values())
    assert {of_row[0][0] for of_row in strata.values()} == {0, 1, 2, 3}


def test_pair_stream_antithetic_draws_are_neighbours() -> None:
    plain, mirrored = (PairStream(rows(6), seed=0, length=12, antithetic=m) for m in (False, True))
    draws = [(mirrored[n]["id"], mirrored[n]["visit"], mirrored[n]["sign"]) for n in range(12)]
    assert draws[::2] == [(plain[n]["id"], 0, 1) for n in range(6)]
    assert draws[1::2] == [(name, visit, -1) for name, visit, _ in draws[::2]]
    both = PairStream(rows(6), seed=0, length=12, antithetic=True, num_strata=4)
    assert [both[n]["stratum"] for n in range(4)] == [s for s in (both[0]["stratum"], both[2]["stratum"]) for _ in "ab"]
    assert {both[n]["stratum"] for n in range(4)} == {(0, 2), (1, 2)}


def test_random_draws_match_golden_values() -> None:
    """Golden values: a run that resumes on another machine or version must use the same noise."""
    assert random_draws.sample_noise_level(0, "row-0", 0) == pytest.approx(GOLDEN_LEVEL, abs=1e-12)
    assert random_draws.sample_noise(0, "row-0", 0, (3,)).tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-6)
    stream = PairStream(rows(3), seed=0, length=10, num_strata=5)
    assert [stream[n]["stratum"][0] for n in range(10)] == GOLDEN_STRATA


GOLDEN_LEVEL = 0.12598352698689952
GOLDEN_NOISE = [1.6251278, -0.5118138, 1.3845577]
GOLDEN_STRATA = [0, 4, 3, 1, 2, 1, 4, 2, 0, 3]
