"""POPE metrics: lenient parsing of responses, and rates over the whole dataset against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_mm.data.schema import Response
from dpo_mm.judges import better_of, load_judge
from dpo_mm.judges.pope import parse_yes_no

YES = (
    "Yes",
    "yes.",
    "**Yes**, there is a dog.",
    "Answer: Yes",
    "Yeah, on the left",
    "There is a dog in the image.",
    "I can see one on the sofa.",
    "That is correct.",
    "Yes, though there is no cat.",
)
NO = (
    "No",
    "no, there isn't.",
    "Nope.",
    "There is no dog in the image.",
    "There isn’t any dog.",
    "I do not see a dog.",
    "None.",
    "The image shows no dog. It shows a cat.",
    "The statement is false.",
    "No, but there is a cat, yes.",
)
NEITHER = (
    "",
    "A dog",
    "Yes or no?",
    "I'm not sure.",
    "I can't tell from here.",
    "Yesterday nobody knows",
    "It is unclear; yes?",
)


@pytest.mark.parametrize(("texts", "meaning"), [(YES, True), (NO, False), (NEITHER, None)])
def test_parse_yes_no_accepts_free_text(texts: tuple[str, ...], meaning: bool | None) -> None:
    assert {text: parse_yes_no(text) for text in texts} == dict.fromkeys(texts, meaning)


def rate(name: str, responses: list[str], ground_truths: list[str]) -> float:
    ratios = np.array(load_judge(name)([Response(text, 1, hit_limit=False) for text in responses], ground_truths))
    return float(ratios[:, 0].sum() / ratios[:, 1].sum())


def test_pope_rates_equal_counts_over_the_dataset() -> None:
    """3 true yes, 2 false yes, 1 missed, 2 right no, 1 unclear response to a yes, 1 question without a ground truth."""
    responses = ["yes"] * 5 + ["no"] * 3 + ["hm", "yes"]
    ground_truths = ["yes"] * 3 + ["no"] * 2 + ["yes"] + ["no"] * 2 + ["yes", "a dog"]
    assert rate("pope_accuracy", responses, ground_truths) == pytest.approx(5 / 9)
    assert rate("pope_precision", responses, ground_truths) == pytest.approx(3 / 5)
    assert rate("pope_recall", responses, ground_truths) == pytest.approx(3 / 5)
    assert rate("pope_f1", responses, ground_truths) == pytest.approx(6 / 10)
    assert rate("yes_ratio", responses, ground_truths) == pytest.approx(5 / 9)


def test_yes_ratio_counts_responses_and_not_ground_truths() -> None:
    assert rate("yes_ratio", ["yes"] * 4, ["no"] * 4) == 1.0
    assert rate("pope_recall", ["yes"] * 4, ["yes", "no", "no", "no"]) == 1.0
    assert rate("pope_precision", ["yes"] * 4, ["yes", "no", "no", "no"]) == 0.25
    assert better_of("yes_ratio") == "neutral" and better_of("pope_f1") == "higher"
