"""Paired statistics: against known values, against scipy, and by simulation with a known difference."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from dpo_mm.evaluation import statistics
from dpo_mm.evaluation.significance import holm, mcnemar, rate_interval
from dpo_mm.evaluation.statistics import (
    Comparison,
    interval_verdict,
    minimum_detectable_effect,
    paired,
    paired_ratios,
    verdict_of,
)
from dpo_mm.evaluation.verdict import run_verdict
from tests.bench.coverage import coverage

FIELDS = ["metric", "judge", "headline", "base", "tuned", "difference", "low", "high", "n", "verdict"]
FIELDS += [
    "wins",
    "ties",
    "losses",
    "p",
    "clusters",
    "p_holm",
    "detectable",
    "built_training_pairs",
    "models",
    "direction",
    "side_set",
    "win_rate",
]


def compare(base, tuned, clusters=None, **options) -> Comparison:
    clusters = np.arange(len(base)) if clusters is None else clusters
    return paired(base, tuned, clusters=clusters, metric="fully correct rate", judge="scene", **options)


def rates(rng, prompts, seeds, base, tuned):
    """Sample whether base and tuned are right for each prompt and seed, with prompts of different difficulty."""
    logit = rng.normal(0, 1.5, prompts).repeat(seeds)

    def sample(shift):
        return rng.random(prompts * seeds) < 1 / (1 + np.exp(-(logit + shift)))

    return sample(base), sample(tuned), np.arange(prompts).repeat(seeds)


def test_difference_is_tuned_minus_base_and_decides_the_verdict():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    tuned = base + 0.2 + rng.normal(0, 0.1, 200)
    up, down = compare(base, tuned), compare(tuned, base)
    assert up.difference == pytest.approx(tuned.mean() - base.mean())
    assert up.low < up.difference < up.high
    assert (up.verdict, down.verdict) == ("better", "worse")
    assert down.difference == pytest.approx(-up.difference)
    assert (up.wins, up.losses) == (down.losses, down.wins) and up.wins > 190


def test_lower_direction_flips_verdict_and_votes_but_not_difference():
    base, tuned = np.full(50, 0.5) + np.arange(50) / 1000, np.full(50, 0.2)
    result = compare(base, tuned, direction="lower")
    assert result.difference < 0 and result.high < 0
    assert (result.verdict, result.wins, result.losses) == ("better", 50, 0)


def test_repeated_items_within_a_prompt_do_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    base, tuned = rng.random(60), rng.random(60)
    ids = np.arange(60)
    once = compare(base, tuned, ids)
    repeated = compare(base.repeat(16), tuned.repeat(16), ids.repeat(16))
    naive = compare(base.repeat(16), tuned.repeat(16))
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.02)
    assert repeated.high - repeated.low > 3.5 * (naive.high - naive.low)
    assert (repeated.wins, repeated.losses, repeated.clusters, repeated.n) == (once.wins, once.losses, 60, 960)
    assert repeated.p == pytest.approx(once.p)
    assert minimum_detectable_effect(base.repeat(16), tuned.repeat(16), ids.repeat(16)) == pytest.approx(
        minimum_detectable_effect(base, tuned, ids)
    )


@pytest.mark.parametrize(("prompts", "seeds"), [(4, 3), (12, 4), (80, 4)])
def test_interval_covers_true_difference_in_95_percent(prompts, seeds):
    rng = np.random.default_rng(prompts)
    covered = 0
    for _ in range(400):
        effect = rng.normal(0.3, 1.0, prompts).repeat(seeds)
        base = rng.normal(size=prompts * seeds)
        tuned = base + effect + rng.normal(0, 1.0, prompts * seeds)
        result = compare(base, tuned, np.arange(prompts).repeat(seeds))
        covered += result.low <= 0.3 <= result.high
    assert 0.92 <= covered / 400 <= 0.985


@pytest.mark.parametrize(
    ("groups", "rate", "samples", "ratios"),
    [(12, 0.5, 4, False), (24, 0.5, 1, False), (24, 0.1, 4, False), (72, 0.1, 1, True), (400, 0.02, 1, True)],
)
def test_printed_interval_of_rates_covers_93_to_97_percent(groups, rate, samples, ratios):
    """It catches a normal quantile, k instead of k - 1, items instead of clusters, and a percentile bootstrap.

    The bounds are those of the full simulation, three standard errors of 300 comparisons wider.
    """
    case = coverage(groups, rate, rate, samples=samples, spread=1.5, runs=300, ratios=ratios)
    assert case["printed"] > 0.8 and 0.89 <= case["coverage"] <= 0.99


def test_interval_of_rare_events_is_too_few():
    case = coverage(24, 0.02, 0.02, samples=1, spread=0.0, runs=100)
    assert case["printed"] < 0.05 and case["coverage"] is None


def test_uneven_clusters_give_the_mean_over_items():
    base, tuned = np.zeros(8), np.array([1.0, 1, 1, 1, 1, 0, 0, 2])
    result = compare(base, tuned, list("aaaaabcd"))
    assert result.difference == pytest.approx(7 / 8)
    assert (result.wins, result.ties, result.losses) == (2, 2, 0)


def test_equal_models_with_other_seeds_are_no_evidence():
    rng = np.random.default_rng(2)
    verdicts = [compare(*rates(rng, 60, 4, 0.0, 0.0)).verdict for run in range(100)]
    assert verdicts.count("no evidence") >= 90


def test_real_gain_is_better():
    rng = np.random.default_rng(3)
    verdicts = [compare(*rates(rng, 100, 4, 0.0, 1.0)).verdict for _ in range(30)]
    assert verdicts.count("better") == 30


def test_sign_test_equals_scipy_with_one_vote_per_prompt():
    difference = np.array([1.0, 1, -1, 1, 1, 1, -1, 0, 1, 1, 1, 1])
    result = compare(np.zeros(36), difference.repeat(3), np.arange(12).repeat(3))
    assert (result.wins, result.ties, result.losses) == (9, 1, 2)
    assert result.p == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert compare(np.ones(5), np.ones(5)).p == 1.0


def test_rounding_error_is_a_tie():
    base, tuned = [0.1, 0.2] * 10, [0.3, 0.0] * 10
    assert (0.3 - 0.1) + (0.0 - 0.2) != 0
    result = compare(base, tuned, np.arange(10).repeat(2))
    assert (result.wins, result.ties, result.losses) == (0, 10, 0)
    assert result.verdict == "no evidence"


def test_equal_differences_need_six_prompts():
    few, enough = compare(np.zeros(5), np.full(5, 0.3)), compare(np.zeros(6), np.full(6, 0.3))
    assert few.low <= 0 < few.high and few.verdict == "no evidence"
    assert 0 < enough.low < 0.3 < enough.high and enough.verdict == "better"
    assert compare(np.zeros(16), np.ones(16)).high == 1.0


def test_interval_needs_five_items_that_differ():
    """It catches an interval from four events, from 15 yes-or-no items, or from yes-or-no items of 11 prompts."""

    def interval(base, tuned, clusters=None):
        one = compare(base, tuned, clusters)
        assert (one.low is None) == (one.high is None)
        return one.low is not None

    tuned = np.zeros(200)
    tuned[:4] = 1.0
    assert not interval(np.zeros(200), tuned) and compare(np.zeros(200), tuned).wins == 4
    tuned[4] = 1.0
    assert interval(np.zeros(200), tuned) and compare(np.zeros(200), tuned).verdict == "no evidence"
    tuned[:9] = 1.0
    assert compare(np.zeros(200), tuned).verdict == "better"
    assert not interval(np.ones(30), np.ones(30)) and not interval([0.0, 0.0], [1.0, 1.2])
    assert not interval(np.zeros(15), np.ones(15)) and interval(np.zeros(16), np.ones(16))
    few, enough = np.arange(11).repeat(4), np.arange(12).repeat(4)
    assert not interval(np.zeros(44), np.ones(44), few) and interval(np.zeros(48), np.ones(48), enough)
    assert interval(np.zeros(9), np.full(9, 0.5))


def test_interval_equals_scipy_t_interval_with_one_item_per_prompt():
    difference = np.random.default_rng(4).normal(0.2, 1, 17)
    one = compare(np.zeros(17), difference)
    expected = stats.t.interval(0.95, 16, loc=difference.mean(), scale=stats.sem(difference))
    assert (one.low, one.high) == pytest.approx(expected)


def test_one_prompt_raises():
    with pytest.raises(ValueError, match=r"1 prompt.*2 or more"):
        compare([0.0, 0.0], [1.0, 1.0], ["a", "a"])


@pytest.mark.parametrize(
    ("base", "tuned", "clusters", "message"),
    [
        ([0.0, 1.0], [1.0], [0, 1], r"tuned \(1,\)"),
        ([0.0, 1.0], [1.0, 0.0], [0], r"clusters \(1,\)"),
        ([0.0, 1.0], [1.0, math.nan], [0, 1], "tuned score of item 1 is nan"),
        ([math.inf, 1.0], [1.0, 0.0], [0, 1], "base score of item 0 is inf"),
        ([], [], [], "0 prompt"),
    ],
)
def test_invalid_scores_raise_with_their_place(base, tuned, clusters, message):
    with pytest.raises(ValueError, match=message):
        compare(base, tuned, clusters)


def test_as_dict_is_json_with_the_documented_keys():
    result = compare(np.array([True, False]), np.array([True, True]), headline=np.bool_(True))
    plain = dataclasses.replace(result, base=np.float32(0.5), n=np.int64(2)).as_dict()
    assert list(plain) == FIELDS
    assert {type(value) for value in plain.values()} == {str, bool, float, int, type(None), list}
    assert json.loads(json.dumps(plain, allow_nan=False))["base"] == 0.5


def test_rate_interval_equals_clopper_pearson_values():
    assert rate_interval(0, 10) == pytest.approx((0.0, 0.308497), abs=1e-6)
    assert rate_interval(5, 10) == pytest.approx((0.187086, 0.812914), abs=1e-6)
    assert rate_interval(10, 10) == pytest.approx((0.691503, 1.0), abs=1e-6)
    for successes, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="successes"):
            rate_interval(successes, n)


def test_mcnemar_counts_only_discordant_items():
    base, tuned = [True] * 20 + [True] + [False] * 8, [True] * 20 + [False] + [True] * 8
    result = mcnemar(base, tuned)
    assert (result.only_base, result.only_tuned) == (1, 8)
    assert result.p == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar([True], [True]).p == 1.0
    with pytest.raises(ValueError, match="tuned"):
        mcnemar([True], [True, False])


def test_holm_equals_hand_arithmetic():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([1.2])


def test_interval_that_ends_at_0_is_no_evidence():
    """It catches an interval that is taken as open."""
    one = compare(np.zeros(17), np.random.default_rng(4).normal(0.2, 1, 17))
    ends = [(0.0, 0.5), (-0.5, 0.0), (0.1, 0.5), (-0.5, -0.1)]
    found = [interval_verdict(dataclasses.replace(one, low=low, high=high)) for low, high in ends]
    assert found == ["no evidence", "no evidence", "better", "worse"]


def test_minimum_detectable_effect_equals_hand_arithmetic():
    """Differences 1, 2 and 6: (4.303 + 1.061) * sqrt(3/2 * (4 + 1 + 9)) / 3, with t of 2 degrees of freedom from a table.

    It catches a variance without k / (k - 1), and quantiles of a normal distribution."""
    effect = minimum_detectable_effect([0, 0, 0], [1, 2, 6], ["a", "b", "c"])
    assert effect == pytest.approx((4.303 + 1.061) * (21**0.5) / 3, rel=1e-3)


def test_minimum_detectable_effect_has_80_percent_power_with_few_prompts():
    """The power of a t-test at this effect, by the noncentral t distribution. 2.8 standard errors have 56 % with 5 prompts."""
    for k, lowest in ((5, 0.78), (12, 0.795), (400, 0.795)):
        differences = np.random.default_rng(k).normal(size=k)
        error = differences.std(ddof=1) / k**0.5
        critical, shift = (
            stats.t.ppf(0.975, k - 1),
            minimum_detectable_effect(np.zeros(k), differences, range(k)) / error,
        )
        power = stats.nct.sf(critical, k - 1, shift) + stats.nct.cdf(-critical, k - 1, shift)
        assert lowest <= power <= 0.805, (k, power)


def test_minimum_detectable_effect_is_detected_in_80_percent():
    rng = np.random.default_rng(6)
    base = rng.normal(size=400)
    effect = minimum_detectable_effect(base, base + rng.normal(size=400), np.arange(400))
    assert effect == pytest.approx(2.8 / 20, rel=0.1)
    detected = sum(
        interval_verdict(compare(np.zeros(400), rng.normal(2.8 / 20, 1.0, 400))) == "better" for _ in range(200)
    )
    assert 0.7 <= detected / 200 <= 0.9


def test_run_verdict_uses_guardrails_only_if_primary_is_better():
    better = compare(np.zeros(50), np.ones(50))
    worse, same = compare(np.ones(50), np.zeros(50)), compare(np.ones(50), np.ones(50))
    assert run_verdict(better, []) == run_verdict(better, [same, better]) == "better"
    assert run_verdict(better, [same, worse]) == "over-optimised"
    assert run_verdict(same, [worse]) == "no evidence"
    assert run_verdict(worse, [better]) == "worse"
    assert run_verdict(better, [same], [better, worse]) == "better here, worse elsewhere"
    assert run_verdict(better, [worse], [worse]) == "over-optimised"
    assert run_verdict(same, [], [worse]) == "no evidence"


def test_verdict_needs_interval_and_sign_test():
    few_gain_much = compare(np.zeros(30), np.r_[np.full(8, 9.0), np.full(7, -0.1), np.zeros(15)])
    assert interval_verdict(few_gain_much) == "better" and few_gain_much.p > 0.05
    assert few_gain_much.verdict == run_verdict(few_gain_much, []) == "no evidence"
    most_lose_little = compare(np.zeros(60), np.r_[np.full(15, 9.0), np.full(45, -0.1)])
    assert interval_verdict(most_lose_little) == "better" and most_lose_little.p < 0.05
    assert most_lose_little.verdict == "no evidence"
    alike = compare(np.zeros(30), np.ones(30))
    assert alike.verdict == "better" and compare(np.ones(30), np.zeros(30)).verdict == "worse"
    assert verdict_of(dataclasses.replace(alike, direction="neutral")) == "differs"
    assert verdict_of(dataclasses.replace(alike, direction="lower", wins=0, losses=30)) == "worse"


def test_verdict_has_few_false_alarms_with_few_prompts():
    """Two equal models, 24 prompts with two seeds each, as in the benchmark of the bundled image model."""
    rng = np.random.default_rng(8)
    prompts, rates = np.repeat(np.arange(24), 2), np.repeat(rng.uniform(0.05, 0.85, 24), 2)
    sample = lambda: (rng.random(48) < rates).astype(float)
    comparisons = [compare(sample(), sample(), clusters=prompts) for _ in range(400)]
    assert sum(one.verdict != "no evidence" for one in comparisons) / len(comparisons) < 0.045
    assert sum(interval_verdict(one) != "no evidence" for one in comparisons) / len(comparisons) < 0.07


def false_alarms(*, clustered: bool, replicates: int = 300) -> float:
    """Return the fraction of verdicts between equal models, with prompts that prefer one of the two by chance."""
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(replicates):
        prompts, seeds = 72, 4
        liking = rng.normal(0, 2, (2, prompts)).repeat(seeds, axis=1)
        noise = rng.normal(0, 1, (2, prompts * seeds))
        ids = np.arange(prompts).repeat(seeds) if clustered else np.arange(prompts * seeds)
        alarms += interval_verdict(compare(*(liking + noise), ids)) != "no evidence"
    return alarms / replicates


def test_false_alarms_stay_below_5_percent_only_with_clusters():
    assert false_alarms(clustered=True) <= 0.05
    assert false_alarms(clustered=False, replicates=100) > 0.2


def test_holm_corrects_the_verdict_of_every_row():
    """It catches a row whose verdict is that of its uncorrected p, and metrics without a direction in the count."""
    rows = [compare(np.zeros(n), np.full(n, 0.3)) for n in (6, 12)]
    neutral = compare(np.zeros(12), np.full(12, 0.3), direction="neutral")
    assert [one.verdict for one in rows] == ["better", "better"]
    both = statistics.holm_corrected([*rows, neutral])
    assert [one.p_holm for one in both] == pytest.approx([2 * 0.5**6, 4 * 0.5**12, 2 * 0.5**12])
    assert [one.verdict for one in both] == ["better", "better", "differs"]
    third = statistics.holm_corrected([rows[0], rows[0]])
    assert [one.p_holm for one in third] == pytest.approx([4 * 0.5**6] * 2)
    assert [one.verdict for one in third] == ["no evidence"] * 2
    assert [dataclasses.replace(one, p_holm=None, verdict="better") for one in third] == [rows[0]] * 2


def test_item_with_rate_zero_on_one_side_votes():
    """It catches items that do not vote if a total is 0: text on 12 blank pages, then none, was no evidence."""
    blank = lambda errors: np.array([[n, 0.0] for n in errors])
    better = paired_ratios(blank(range(1, 13)), blank([0] * 12), metric="m", judge="j", direction="lower")
    assert (better.wins, better.ties, better.losses, better.verdict) == (12, 0, 0, "better")
    fewer = paired_ratios(blank([9] * 3), blank([2, 9, 30]), metric="m", judge="j", direction="lower")
    assert (fewer.wins, fewer.ties, fewer.losses) == (1, 1, 1)
    mixed = np.array([[0.0, 0], [0, 0], [0, 5]]), np.array([[1.0, 5], [0, 3], [0, 0]])
    one = paired_ratios(*mixed, metric="m", judge="j", direction="lower")
    assert (one.wins, one.ties, one.losses) == (0, 2, 1)


def test_weights_give_the_mean_over_categories():
    base, tuned = np.zeros(16), np.array([1.0] * 12 + [0.0] * 4)
    weights = np.array([1 / 12] * 12 + [1 / 4] * 4)
    plain, balanced = compare(base, tuned), compare(base, tuned, weights=weights)
    assert (plain.tuned, balanced.tuned) == pytest.approx((0.75, 0.5))
    assert balanced.difference == pytest.approx(0.5) and balanced.low < 0.5 < balanced.high
    assert (balanced.wins, balanced.ties) == (plain.wins, plain.ties)
    assert compare(base, tuned, weights=np.full(16, 7.0)).high == pytest.approx(plain.high)


def test_neutral_direction_gives_differs():
    up = compare(np.zeros(40), np.ones(40), direction="neutral")
    assert up.verdict == "differs" and compare(np.ones(40), np.ones(40), direction="neutral").verdict == "no evidence"


def test_win_rate_counts_a_tie_half():
    tuned = np.array([1.0] * 6 + [0.0] * 2 + [-1.0] * 2)
    assert compare(np.zeros(10), tuned).win_rate == pytest.approx(0.7)
    assert compare(np.zeros(10), tuned, direction="lower").win_rate == pytest.approx(0.3)


@pytest.mark.parametrize("direction", ["neither", "up", ""])
def test_unknown_direction_raises(direction):
    with pytest.raises(ValueError, match=r"direction .* is unknown\. Use one of higher, lower, neutral"):
        compare(np.zeros(9), np.ones(9), direction=direction)
    with pytest.raises(ValueError, match=r"direction .* is unknown"):
        paired_ratios(np.ones((9, 2)), np.ones((9, 2)), metric="m", judge="j", direction=direction)


def test_models_of_a_comparison_are_written_as_a_list():
    result = compare(np.zeros(9), np.ones(9), models=("sft", "tuned"))
    assert result.as_dict()["models"] == ["sft", "tuned"] and result.as_dict()["metric"] == "fully correct rate"
    assert compare(np.zeros(9), np.ones(9)).models == ("base", "tuned")
