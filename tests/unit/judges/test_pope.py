"""POPE's measures: answers are read kindly, and every rate is the whole set's, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_mm.data.schema import Response
from dpo_mm.judges import better_of, load_judge
from dpo_mm.judges.pope import said

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
def test_answers_are_read_kindly(texts: tuple[str, ...], meaning: bool | None) -> None:
    assert {text: said(text) for text in texts} == dict.fromkeys(texts, meaning)


def rate(name: str, answers: list[str], truths: list[str]) -> float:
    shares = np.array(load_judge(name)([Response(text, 1, hit_limit=False) for text in answers], truths))
    return float(shares[:, 0].sum() / shares[:, 1].sum())


def test_rates_are_those_of_the_whole_set() -> None:
    """3 true yes, 2 false yes, 1 missed, 2 right no, 1 mumbled where yes was true, 1 question without a truth."""
    answers = ["yes"] * 5 + ["no"] * 3 + ["hm", "yes"]
    truths = ["yes"] * 3 + ["no"] * 2 + ["yes"] + ["no"] * 2 + ["yes", "a dog"]
    assert rate("pope_accuracy", answers, truths) == pytest.approx(5 / 9)
    assert rate("pope_precision", answers, truths) == pytest.approx(3 / 5)
    assert rate("pope_recall", answers, truths) == pytest.approx(3 / 5)
    assert rate("pope_f1", answers, truths) == pytest.approx(6 / 10)
    assert rate("yes_ratio", answers, truths) == pytest.approx(5 / 9)


def test_the_share_of_yes_is_the_models_and_not_the_truths() -> None:
    assert rate("yes_ratio", ["yes"] * 4, ["no"] * 4) == 1.0
    assert rate("pope_recall", ["yes"] * 4, ["yes", "no", "no", "no"]) == 1.0
    assert rate("pope_precision", ["yes"] * 4, ["yes", "no", "no", "no"]) == 0.25
    assert better_of("yes_ratio") == "neutral" and better_of("pope_f1") == "higher"
