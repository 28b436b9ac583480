"""Notes next to the verdict: each names the test that does not confirm an interval."""

from __future__ import annotations

import dataclasses

import pytest

from dpo_mm.evaluation.statistics import Comparison, verdict_of
from dpo_mm.evaluation.verdict import note_against_sft, note_training_judges, note_unconfirmed, run_summary

BETTER = Comparison(
    metric="character error rate", judge="cer", headline=False, base=0.5, tuned=0.4, difference=-0.1, low=-0.2, high=-0.01,
    n=40, verdict="better", wins=30, ties=0, losses=10, p=0.002, clusters=40, p_holm=0.004, direction="lower",
)  # fmt: skip


def row(**changes: object) -> Comparison:
    changed = dataclasses.replace(BETTER, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(changed, verdict=verdict_of(changed))


def note(**changes: object) -> list[str]:
    return note_unconfirmed([row(**changes)])


def test_failed_sign_test_is_blamed_before_holm() -> None:
    """Mutation that it catches: Holm's correction is blamed for a p that is above 0.05 without it."""
    start = "character error rate is better by its interval"
    unconfirmed = f"{start}, but the sign test does not confirm it (p 0.89, 30 better, 10 worse). A verdict needs both."
    assert note(p=0.89, p_holm=0.89) == [unconfirmed]
    assert note(p=0.049, p_holm=0.098) == [
        f"{start} and its sign test (p 0.049), but not after Holm's correction for the number of metrics (p 0.098). "
        "A verdict needs all of them."
    ]


def test_significant_votes_against_the_interval_are_noted() -> None:
    (words,) = note(wins=10, losses=30)
    assert "does not confirm it (p 0.002, 10 better, 30 worse)." in words and "Holm" not in words


@pytest.mark.parametrize(
    "changes", [{}, {"low": -0.2, "high": 0.1, "p": 0.9}, {"low": None, "high": None}, {"models": ("sft", "tuned"), "p": 0.9}]
)  # fmt: skip
def test_confirmed_or_untested_metric_has_no_note(changes: dict[str, object]) -> None:
    assert note(**changes) == []


def test_summary_names_what_got_worse_and_counts_if_there_is_no_interval() -> None:
    """It catches a summary that names only the primary metric, and a printed interval of None."""
    worse = row(metric="loops", wins=10, losses=30, low=0.1, high=0.2)
    primary = row(headline=True, low=None, high=None, wins=3, losses=1, p=0.6, p_holm=None)
    text = run_summary([worse, primary], "no evidence", unit="responses")
    assert "too few differ for an interval: 3 better, 1 worse" in text
    assert text.endswith("Verdict: no evidence. Significantly worse: loops (0.500 to 0.400).")
    assert "Significantly" not in run_summary([row(headline=True)], "better", unit="responses")
    assert "too few differ" in note_against_sft(primary)


def test_judge_that_built_the_pairs_is_named_and_explained_if_primary() -> None:
    guard = dataclasses.replace(BETTER, built_training_pairs=True)
    primary = dataclasses.replace(BETTER, judge="valid_json", headline=True)
    assert note_training_judges([primary]) == []
    assert note_training_judges([primary, guard]) == [
        "The judge cer also built the training pairs, so the score is optimistic."
    ]
    (words,) = note_training_judges([dataclasses.replace(primary, built_training_pairs=True)])
    assert "The judge valid_json is still the primary metric, because it is rule-based" in words
