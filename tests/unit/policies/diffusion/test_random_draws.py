from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpo_mm.policies.diffusion import random_draws
from dpo_mm.training.pair_stream import PairStream


def test_draws_are_a_function_of_seed_row_and_visit() -> None:
    one = random_draws.sample_noise(0, "row", 3, (4, 8, 8))
    assert np.array_equal(one, random_draws.sample_noise(0, "row", 3, (4, 8, 8))) and one.dtype == np.float32
    others = [random_draws.sample_noise(*key, (4, 8, 8)) for key in ((1, "row", 3), (0, "wor", 3), (0, "row", 4))]
    others.append(random_draws.sample_noise(0, "row", 3, (4, 8, 8), what="posterior"))
    assert not any(np.array_equal(one, other) for other in others)
    assert (
        random_draws.sample_noise_level(0, "row", 3)
        == random_draws.sample_noise_level(0, "row", 3)
        != random_draws.sample_noise_level(0, "row", 4)
    )


def levels(count: int, **how: Any) -> list[float]:
    return [random_draws.sample_noise_level(0, str(n), 0, **how) for n in range(count)]


def test_noise_is_gaussian_and_timesteps_uniform() -> None:
    noise = np.concatenate([random_draws.sample_noise(0, str(n), 0, (4, 8, 8)).ravel() for n in range(40)])
    assert stats.kstest(noise, "norm").pvalue > 0.001
    found = levels(2000, within=(0.2, 0.7))
    assert stats.kstest(found, "uniform", args=(0.2, 0.5)).pvalue > 0.001
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.08


def test_logit_normal_levels_are_those_of_a_normal_cut_to_the_range() -> None:
    """Mutation that it catches: clipping to the range, which would heap levels at its ends."""
    found = np.array(levels(2000, kind="logit_normal"))
    assert stats.kstest(np.log(found / (1 - found)), "norm").pvalue > 0.001
    cut = np.array(levels(2000, kind="logit_normal", within=(0.3, 0.9)))
    ends = [math.log(end / (1 - end)) for end in (0.3, 0.9)]
    assert stats.kstest(np.log(cut / (1 - cut)), "truncnorm", args=tuple(ends)).pvalue > 0.001
    assert cut.min() >= 0.3 and cut.max() < 0.9


@pytest.mark.parametrize("kind", random_draws.TIMESTEP_DISTRIBUTIONS)
def test_a_stratum_is_its_part_of_the_distribution(kind: str) -> None:
    edges = [random_draws.TIMESTEP_DISTRIBUTIONS[kind](n / 8, 0.1, 0.9) for n in range(9)]
    for which in range(8):
        found = levels(50, kind=kind, within=(0.1, 0.9), stratum=(which, 8))
        assert all(edges[which] <= level < edges[which + 1] for level in found)
    assert [random_draws.TIMESTEP_DISTRIBUTIONS[kind](share, 0.1, 0.9) for share in (0.0, 1.0)] == pytest.approx(
        [0.1, 0.9]
    )


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"row-{n}"} for n in range(count)]


def steps(stream: PairStream, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(stream), size):
        yield [stream[n] for n in range(start, start + size)]


def test_a_steps_rows_take_every_stratum_once_in_an_order_of_its_own() -> None:
    stream = PairStream(rows(10), seed=0, length=80, num_strata=8)
    found = [[row["stratum"] for row in step] for step in steps(stream, 8)]
    assert all(sorted(step) == [(n, 8) for n in range(8)] for step in found)
    assert len({tuple(step) for step in found}) == 10
    again = PairStream(rows(10), seed=0, length=800, num_strata=8)  # a longer run, asked in the middle: a resumed one
    assert [again[n]["stratum"] for n in (17, 63)] == [stream[n]["stratum"] for n in (17, 63)]


def test_strata_of_fixed_draws_are_a_rows_own() -> None:
    """A row's K draws cover the schedule, and do so in no common order, so that an epoch does too."""
    stream = PairStream(rows(40), seed=0, length=160, num_fixed_draws=4, num_strata=8)
    found: dict[str, list[tuple[int, int]]] = {}
    for n in range(len(stream)):
        found.setdefault(stream[n]["id"], []).append(stream[n]["stratum"])
    assert all(sorted(own) == [(n, 4) for n in range(4)] for own in found.values())
    assert {own[0][0] for own in found.values()} == {0, 1, 2, 3}


def test_mirrored_visits_stand_next_to_each_other() -> None:
    plain, mirrored = (PairStream(rows(6), seed=0, length=12, antithetic=m) for m in (False, True))
    found = [(mirrored[n]["id"], mirrored[n]["visit"], mirrored[n]["sign"]) for n in range(12)]
    assert found[::2] == [(plain[n]["id"], 0, 1) for n in range(6)]
    assert found[1::2] == [(name, visit, -1) for name, visit, _ in found[::2]]
    both = PairStream(rows(6), seed=0, length=12, antithetic=True, num_strata=4)
    assert [both[n]["stratum"] for n in range(4)] == [s for s in (both[0]["stratum"], both[2]["stratum"]) for _ in "ab"]
    assert {both[n]["stratum"] for n in range(4)} == {(0, 2), (1, 2)}


def test_a_known_draw_never_changes() -> None:
    """A golden value: a resumed run on another machine or version must see the same draws."""
    assert random_draws.sample_noise_level(0, "row-0", 0) == pytest.approx(GOLDEN_LEVEL, abs=1e-12)
    assert random_draws.sample_noise(0, "row-0", 0, (3,)).tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-6)
    stream = PairStream(rows(3), seed=0, length=10, num_strata=5)
    assert [stream[n]["stratum"][0] for n in range(10)] == GOLDEN_STRATA


GOLDEN_LEVEL = 0.12598352698689952
GOLDEN_NOISE = [1.6251278, -0.5118138, 1.3845577]
GOLDEN_STRATA = [0, 4, 3, 1, 2, 1, 4, 2, 0, 3]
