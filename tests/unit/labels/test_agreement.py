"""Krippendorff's alpha, on the published worked examples, and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_mm.labels.agreement import MIN_DOUBLE_PAIRS, Alpha, alphas, krippendorff_alpha
from dpo_mm.labels.export import summary
from dpo_mm.labels.store import Vote
from dpo_mm.printing.printed_text import counted

FOUR_OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Krippendorff 2011, section C: four observers, twelve units, missing values. Alpha for nominal data is 0.743."""
TWO_OBSERVERS = """
0 1 0 0 0 0 0 0 1 0
1 1 1 0 0 1 0 0 0 0
"""
"""Krippendorff 2011, section A: two observers, binary data, no missing value. Alpha is 0.095."""


def vote(annotator: str, pair: str, choice: str, *, is_repeat: bool = False) -> Vote:
    return Vote(annotator, pair, is_repeat, False, choice, 0.0, 1.0)


def votes_of(example: str) -> list[Vote]:
    return [
        vote(f"person {number}", f"{unit:02}", "skip" if value == "." else value)
        for number, line in enumerate(example.strip().splitlines())
        for unit, value in enumerate(line.split())
    ]


@pytest.mark.parametrize(("example", "alpha", "pairs"), [(FOUR_OBSERVERS, 0.743, 11), (TWO_OBSERVERS, 0.095, 10)])
def test_alpha_equals_the_published_examples(example: str, alpha: float, pairs: int) -> None:
    """It catches pairs with one vote that count, and expected agreement with replacement (n^2 for n (n - 1))."""
    result = krippendorff_alpha(votes_of(example))
    assert result.value == pytest.approx(alpha, abs=5e-4) and result.pairs == pairs
    assert result.low < alpha < result.high
    again = [vote("person 0", "00", "other", is_repeat=True), *votes_of(example)]
    assert krippendorff_alpha(again) == result, "repeats of one person do not count"


def test_interval_resamples_pairs() -> None:
    """Alpha of drawn pairs, computed one by one on a list with repeated pairs. It catches resampled votes."""
    table = np.random.default_rng(0).multinomial(3, [0.5, 0.3, 0.2], 12).astype(float)
    drawn = np.random.default_rng(1).integers(12, size=(5, 12))
    weights = np.stack([np.bincount(row, minlength=12) for row in drawn]).astype(float)
    expected = [alphas(table[row], np.ones((1, 12)))[0] for row in drawn]
    assert alphas(table, weights) == pytest.approx(expected)
    choices = np.random.default_rng(2).integers(2, size=400).astype(str)
    noisy = [vote(name, f"{n}", choice) for n, choice in enumerate(choices) for name in ("Ada", "Grace")]
    noisy[::5] = [vote("Ada", each.pair, "1") for each in noisy[::5]]
    few, many = (krippendorff_alpha(noisy[:count]) for count in (80, 800))
    assert few.high - few.low > 2 * (many.high - many.low), "ten times the pairs: about a third of the width"


def test_alpha_of_too_few_double_votes_is_not_a_number() -> None:
    votes = [vote(name, f"{n}", "a") for n in range(MIN_DOUBLE_PAIRS) for name in ("Ada", "Grace")]
    assert krippendorff_alpha(votes[:2]).text() == (
        f"too few double votes: 1 pair with votes of two or more people, and {MIN_DOUBLE_PAIRS} are needed"
    )
    assert krippendorff_alpha([]).text().startswith("too few double votes: 0 pairs")
    assert krippendorff_alpha(votes).text().startswith("not defined: everybody chose the same")
    assert Alpha(0.5, 0.25, 0.75, 20).text() == (
        "0.50 (95 % interval 0.25 to 0.75), from 20 pairs with votes of two or more people"
    )


def test_numbers_have_the_right_noun() -> None:
    facts = summary([vote("Ada", "1", "a")])
    assert facts["votes"] == "1 by 1 person" and facts["left won"] == "1 of 1 vote with a winner"
    assert facts["agreement (Krippendorff's alpha)"].startswith("too few double votes: 0 pairs")
    assert counted(0, "pair") == "0 pairs" and counted(1200, "person", "people") == "1,200 people"
