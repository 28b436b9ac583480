"""Judges of yes-or-no questions about an image, as in POPE ("Is there a dog in the image?").

The judges are accuracy, precision, recall and F1 of "yes", and the yes ratio. A model that always answers yes has full
recall, so report the yes ratio too. The yes ratio counts the PREDICTED "yes" (a known evaluator counts those of the
ground truth by mistake). Every metric is a ratio of sums, so precision and F1 are those of the whole dataset.

Responses are parsed leniently: "Yes, there is one." is a yes and "There isn't any dog." a no. A response that is neither
counts as wrong and not as a yes. Questions whose ground truth is neither are skipped.

Source: POPE, Li et al. 2023 (2305.10355).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio

UNDECIDED = re.compile(
    r"\byes (or|and|/) ?no\b|\byes/no\b|\bnot (sure|certain)\b|\b(unsure|unclear|uncertain)\b|\bcan(no|')?t (tell|say)\b"
)
YES_OR_NO = re.compile(r"\b(yes|yeah|yep|no|nope)\b")
NEGATED = re.compile(
    r"\b(not|none|nothing|never|cannot|without|neither|absent)\b|n't\b|\b(is|are|see|has|contains?|shows?) no\b"
)
AFFIRMED = re.compile(
    r"\b(there (is|are)|i (can )?see|it (is|does)|correct|true|indeed|present|visible|shows?|contains?)\b"
)
REFUTED = re.compile(r"\b(incorrect|false|untrue)\b")


def parse_yes_no(text: str) -> bool | None:
    """Parse a response: True for yes, False for no, None for neither.

    The first yes or no decides. Without one, the first sentence decides.
    """
    plain = " ".join(text.lower().replace("’", "'").split())
    if UNDECIDED.search(plain):
        return None
    word = YES_OR_NO.search(re.sub(r"\b(is|are|see|has|contains?|shows?) no\b", "isn't", plain))
    if word:
        return word[1].startswith("y")
    first_sentence = re.split(r"[.!?]", plain)[0]
    if NEGATED.search(first_sentence) or REFUTED.search(first_sentence):
        return False
    return True if AFFIRMED.search(first_sentence) else None


def _ratios(
    responses: Sequence[Response], ground_truths: Sequence[str], ratio: Callable[[bool | None, bool], Ratio]
) -> list[Ratio]:
    """Ratio of each parsed response and its parsed ground truth. A ground truth that is neither gives 0 of 0."""
    pairs = (
        (parse_yes_no(response.text), parse_yes_no(ground_truth))
        for response, ground_truth in zip(responses, ground_truths, strict=True)
    )
    return [Ratio(0, 0) if expected is None else ratio(predicted, expected) for predicted, expected in pairs]


def accuracy(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """POPE accuracy: responses that agree with the ground truth."""
    return _ratios(responses, ground_truths, lambda predicted, expected: Ratio(float(predicted is expected), 1))


def precision(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """POPE precision: ground truths that are yes, of the responses that are yes."""
    return _ratios(
        responses,
        ground_truths,
        lambda predicted, expected: Ratio(float(predicted is True and expected), float(predicted is True)),
    )


def recall(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """POPE recall: responses that are yes, of the ground truths that are yes."""
    return _ratios(
        responses,
        ground_truths,
        lambda predicted, expected: Ratio(float(predicted is True and expected), float(expected)),
    )


def f1(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """POPE F1 of yes: twice the number where both are yes, divided by the yes of both together."""
    return _ratios(
        responses,
        ground_truths,
        lambda predicted, expected: Ratio(
            2.0 * (predicted is True and expected), float(predicted is True) + float(expected)
        ),
    )


def yes_ratio(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """POPE yes ratio: fraction of responses that are yes."""
    return _ratios(responses, ground_truths, lambda predicted, _: Ratio(float(predicted is True), 1))
