"""Scores of custom judges in every wrapping are the same numbers, and anything else is refused with judge and row."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio, check_outputs
from dpo_mm.judges.score_checks import higher_is_better_scores, image_scores, pair_probabilities, response_ratios
from tests.conftest import noise_image

PROMPTS = ["a cat", "a dog", "a bird"]
IMAGES = [noise_image(n) for n in range(3)]
NUMBERS = [0.5, -1.0, 2.0]
NAME = "score_checks_judge:judge"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that makes the judge NAME return a value."""

    def set_value(value: Any, **attributes: Any) -> None:
        module: Any = types.ModuleType("score_checks_judge")
        module.judge = lambda *_: value
        vars(module.judge).update(attributes)
        monkeypatch.setitem(sys.modules, "score_checks_judge", module)

    return set_value


@pytest.mark.parametrize(
    "value",
    [
        NUMBERS,
        tuple(NUMBERS),
        iter(NUMBERS),
        np.array(NUMBERS, np.float32),
        np.array(NUMBERS)[:, None],
        [[number] for number in NUMBERS],
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS).bfloat16(),
        torch.tensor(NUMBERS, requires_grad=True)[:, None],
        [torch.tensor(number).half() for number in NUMBERS],
        [torch.tensor([number], requires_grad=True) for number in NUMBERS],
        [np.float32(number) for number in NUMBERS],
    ],
)
def test_image_scores_accepts_every_wrapping(value: Any, judge: Callable[..., None]) -> None:
    """Catches (n, 1) that broadcasts, and tensors that numpy cannot read."""
    judge(value)
    scores = image_scores(NAME, IMAGES, PROMPTS)
    assert scores.dtype == np.float64 and scores.tolist() == NUMBERS


def test_higher_is_better_scores_flips_the_sign(judge: Callable[..., None]) -> None:
    judge(NUMBERS, better="lower")
    assert higher_is_better_scores(NAME, IMAGES, PROMPTS).tolist() == [-0.5, 1.0, -2.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5, float("nan"), 1], "returned nan for prompt 'a dog'. Expected a finite number"),
        ([0.5, 1, None], "returned nan for prompt 'a bird'"),
        (torch.tensor([0.5, float("inf"), 1]), "returned inf for prompt 'a dog'"),
        (NUMBERS[:2], "returned 2 scores for 3 images. Return one score per image"),
        ([*NUMBERS, 1], "returned 4 scores for 3 images"),
        ([NUMBERS], r"returned the shape \(1, 3\) for 3 images"),
        ([[1, 2]] * 3, r"returned the shape \(3, 2\) for 3 images"),
        ([1, [2, 3], 4], "did not return one number per row"),
        (0.5, r"returned the shape \(\) for 3 images"),
        (["0.5", "1", "2"], "did not return one number per row .*str '0.5'"),
        ({"score": NUMBERS}, "did not return one number per row .*dict"),
        (None, "did not return one number per row|returned nan"),
    ],
)
def test_image_scores_refuses_other_values(value: Any, message: str, judge: Callable[..., None]) -> None:
    """Catches NaN and missing scores that become pairs, and texts that are converted."""
    judge(value)
    with pytest.raises(ValueError, match=f"judge '{NAME}' .*{message}|judge '{NAME}' {message}"):
        image_scores(NAME, IMAGES, PROMPTS)


def test_pair_probabilities_are_from_0_to_1(judge: Callable[..., None]) -> None:
    judge(torch.tensor([[0.0], [0.5], [1.0]]), pairwise=True)
    assert pair_probabilities(NAME, IMAGES, IMAGES, PROMPTS).tolist() == [0, 0.5, 1]
    judge([0.5, 1.5, 0.5], pairwise=True)
    with pytest.raises(ValueError, match=r"returned 1\.5 for prompt 'a dog'. Expected a probability"):
        pair_probabilities(NAME, IMAGES, IMAGES, PROMPTS)


def test_response_ratios_are_hits_and_totals(judge: Callable[..., None]) -> None:
    responses = [Response("one", 1, hit_limit=False), Response("two", 1, hit_limit=False)]
    judge([Ratio(1, 2), Ratio(torch.tensor(0.5, requires_grad=True), 1)])
    assert response_ratios(NAME, responses, [[""], [""]]).tolist() == [[1, 2], [0.5, 1]]
    for value, message in (
        ([Ratio(float("nan"), 1), Ratio(0, 1)], r"returned nan for response 0 \('one'\)"),
        ([Ratio(1, 1)], r"returned \(1, 2\) for 2 responses"),
        ([0.5, 0.5], "Return one Ratio"),
        ([Ratio(1, 1), Ratio(0, -1)], r"a total below 0 for response 1 \('two'\)"),
    ):
        judge(value)
        with pytest.raises(ValueError, match=message):
            response_ratios(NAME, responses, [[""], [""]])


def test_response_ratios_takes_the_best_of_several_truths() -> None:
    """Catches a list that becomes the text of a list, the worst instead of the best, and lower instead of higher."""
    responses = [Response(text, 1, hit_limit=False) for text in ("June 25", "25th June", "July")]
    truths = [["25th June", "June 25"]] * 2 + [["June", "Juli"]]
    assert response_ratios("anls", responses, truths).tolist() == [[1, 1], [1, 1], [0.75, 1]]
    assert response_ratios("cer", responses, truths).tolist() == [[0, 7], [0, 9], [1, 4]]


@pytest.mark.parametrize(("judge", "outputs"), [("cer", "images"), ("aesthetic", "responses")])
def test_judge_of_the_other_kind_of_outputs_is_refused(judge: str, outputs: Any) -> None:
    with pytest.raises(ValueError, match=f"judge '{judge}' scores .*, not {outputs}"):
        check_outputs(judge, outputs)
    check_outputs(judge, "responses" if outputs == "images" else "images")
