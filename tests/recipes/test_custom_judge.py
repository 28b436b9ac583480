"""The recipe's judge evaluates arithmetic without executing it, and the synthetic task's ground truth is correct."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_mm.data.schema import Response
from dpo_mm.worlds import sums

PATH = Path(__file__).parents[2] / "recipes" / "custom_judge.py"


@pytest.fixture(scope="module")
def judge() -> Any:
    spec = importlib.util.spec_from_file_location("custom_judge_under_test", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12+35", 47), (" 80-33 ", 47), ("2*(3+4)-1", 13), ("-3+5", 2), ("(1+2)*-3", -9)],
)
def test_arithmetic_expression_is_evaluated(text: str, expected: int, judge: Any) -> None:
    assert judge.value(text) == expected


@pytest.mark.parametrize(
    "text",
    ["47", "-47", "12+35=47", "9**9**9**9", "12+", "(12+35", "007+1", "1/0", "a+b", "__import__('os').system('x')", "",
     "1+1;2+2", "4(3)+1", "(" * 200 + "1+1" + ")" * 200, "1+" * 40 + "1", "٣+٤"],
)  # fmt: skip
def test_other_text_gives_none_and_is_not_executed(text: str, judge: Any) -> None:
    assert judge.value(text) is None


def test_response_is_right_if_it_evaluates_to_the_ground_truth(judge: Any) -> None:
    responses = [Response(text, 3, hit_limit=False) for text in ("12+35", "12+45", "12+35=47", "47")]
    assert [ratio.hits for ratio in judge.right(responses, ["47"] * 4)] == [1, 0, 0, 0]
    assert [ratio.hits for ratio in judge.runs(responses, ["47"] * 4)] == [1, 1, 0, 0]
    assert judge.right.by_rule


def test_expressions_of_the_synthetic_task_are_correct_and_noisy_answers_are_not(judge: Any) -> None:
    held_out, rng = list(sums.sums(400, 0, held_out=True)), np.random.default_rng(0)
    assert all(judge.value(sums.expression(question)) == question.number for question in held_out)
    assert not {question.prompt for question in held_out} & {question.prompt for question in sums.sums(10**6, 1)}
    fraction_right = np.mean(
        [judge.value(sums.noisy_answer(question, rng)) == question.number for question in held_out]
    )
    assert 0.3 < fraction_right < 0.6
