"""Scores of base and tuned for the same questions, from judges that compare two responses or may give no score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpo_mm.data.questions import Question
from dpo_mm.evaluation.response_sampling import ScoredResponses
from dpo_mm.judges import better_of, is_pairwise, takes_questions
from dpo_mm.judges.score_checks import response_preferences


def paired_scores(
    base: ScoredResponses, tuned: ScoredResponses, questions: Sequence[Question], judges: Sequence[str]
) -> tuple[ScoredResponses, ScoredResponses]:
    """Add the preferences of pairwise judges, and leave out rows on both sides that have no score on one.

    Args:
        base, tuned: responses to the same questions, with the scores of the other judges.
        questions: the questions.
        judges: names of all judges.

    Returns:
        Base and tuned. A row that a judge leaves out has 0 hits of 0.
    """
    before, after = dict(base.ratios), dict(tuned.ratios)
    for judge in filter(takes_questions, judges):
        if is_pairwise(judge):
            before[judge], after[judge] = response_preferences(judge, base.responses, tuned.responses, questions)
            continue
        scored = (before[judge][:, 1:] > 0) & (after[judge][:, 1:] > 0)
        before[judge], after[judge] = before[judge] * scored, after[judge] * scored
    return dataclasses.replace(base, ratios=before), dataclasses.replace(tuned, ratios=after)


def scored_rows(judge: str, base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """Mark the rows of two models that a judge has scored, (rows,), bool. All rows, unless the judge takes questions.

    Raises:
        ValueError: if fewer than 2 rows have a score.
    """
    if not takes_questions(judge):
        return np.ones(len(base), dtype=bool)
    scored = (base[:, 1] > 0) & (tuned[:, 1] > 0)
    if scored.sum() < 2:
        raise ValueError(
            f"judge {judge}: {scored.sum()} of {len(base)} pairs of responses have a score, and a comparison needs 2. Read its "
            "replies on a few questions, or use another model"
        )
    return scored


def note_agreement(base: ScoredResponses, tuned: ScoredResponses, judges: Sequence[str]) -> list[str]:
    """Report how often a judge that takes questions agrees with each other judge on which response is better.

    Only questions count on which both judges see a difference.
    """
    signs = {judge: _preferred(judge, base, tuned) for judge in judges if better_of(judge) != "neutral"}
    notes = []
    for judge in filter(takes_questions, signs):
        for other in signs:
            both = (signs[judge] != 0) & (signs[other] != 0)
            if takes_questions(other) or not both.any():
                continue
            agree = int((signs[judge] == signs[other])[both].sum())
            notes.append(
                f"{judge} agrees with {other} on {agree} of {both.sum()} questions on which both prefer a response."
            )
    return notes


def _preferred(judge: str, base: ScoredResponses, tuned: ScoredResponses) -> np.ndarray:
    """1 if a judge prefers the tuned response, -1 if the base's, 0 for neither, (questions,)."""
    rates = [
        np.divide(hits, totals, out=np.zeros(len(hits)), where=totals > 0)
        for hits, totals in (scored.ratios[judge].T for scored in (base, tuned))
    ]
    return np.sign(rates[1] - rates[0]) * (-1 if better_of(judge) == "lower" else 1)
