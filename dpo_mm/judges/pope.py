"""Judges of yes-or-no questions about a picture, as POPE asks them ("Is there a dog in the image?").

Accuracy, precision, recall and F1 of "yes", and how often the model says yes at all: a model that says yes to everything
has full recall, so the PREDICTED share of yes stands beside (a known evaluator counts the truth's by mistake). Each is a
share of sums, so that precision and F1 are the whole set's. Answers are read kindly: "Yes, there is one." is a yes and
"There isn't any dog." a no; what says neither is wrong, and no yes. Questions whose truth is neither are left out.
Source: POPE, Li et al. 2023 (2305.10355).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio

EITHER = re.compile(
    r"\byes (or|and|/) ?no\b|\byes/no\b|\bnot (sure|certain)\b|\b(unsure|unclear|uncertain)\b|\bcan(no|')?t (tell|say)\b"
)
SAID = re.compile(r"\b(yes|yeah|yep|no|nope)\b")
DENIED = re.compile(
    r"\b(not|none|nothing|never|cannot|without|neither|absent)\b|n't\b|\b(is|are|see|has|contains?|shows?) no\b"
)
STATED = re.compile(
    r"\b(there (is|are)|i (can )?see|it (is|does)|correct|true|indeed|present|visible|shows?|contains?)\b"
)
REFUTED = re.compile(r"\b(incorrect|false|untrue)\b")


def said(text: str) -> bool | None:
    """True where an answer says yes, False where no, None where neither: by its first yes or no, else by its first sentence."""
    plain = " ".join(text.lower().replace("’", "'").split())
    if EITHER.search(plain):
        return None
    word = SAID.search(re.sub(r"\b(is|are|see|has|contains?|shows?) no\b", "isn't", plain))
    if word:
        return word[1].startswith("y")
    first = re.split(r"[.!?]", plain)[0]
    if DENIED.search(first) or REFUTED.search(first):
        return False
    return True if STATED.search(first) else None


def _each(
    answers: Sequence[Response], truths: Sequence[str], share: Callable[[bool | None, bool], Ratio]
) -> list[Ratio]:
    pairs = ((said(answer.text), said(truth)) for answer, truth in zip(answers, truths, strict=True))
    return [Ratio(0, 0) if truth is None else share(answer, truth) for answer, truth in pairs]


def accuracy(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Whether the answer says what the truth does."""
    return _each(answers, truths, lambda answer, truth: Ratio(float(answer is truth), 1))


def precision(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Of the answers that say yes, those where the truth does."""
    return _each(answers, truths, lambda answer, truth: Ratio(float(answer is True and truth), float(answer is True)))


def recall(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Of the truths that say yes, those where the answer does."""
    return _each(answers, truths, lambda answer, truth: Ratio(float(answer is True and truth), float(truth)))


def f1(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """F1 of yes: twice what both say yes to, of all that either does."""
    yes = lambda answer, truth: float(answer is True) + float(truth)
    return _each(answers, truths, lambda a, t: Ratio(2.0 * (a is True and t), yes(a, t)))


def yes_ratio(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """How often the answer says yes."""
    return _each(answers, truths, lambda answer, truth: Ratio(float(answer is True), 1))
