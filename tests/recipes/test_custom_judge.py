"""The recipe's judge works answers out and runs none of them; the world's right answers are right."""

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
def test_arithmetic_is_worked_out(text: str, expected: int, judge: Any) -> None:
    assert judge.value(text) == expected


@pytest.mark.parametrize(
    "text",
    ["47", "-47", "12+35=47", "9**9**9**9", "12+", "(12+35", "007+1", "1/0", "a+b", "__import__('os').system('x')", "",
     "1+1;2+2", "4(3)+1", "(" * 200 + "1+1" + ")" * 200, "1+" * 40 + "1", "٣+٤"],
)  # fmt: skip
def test_anything_else_is_none_and_nothing_is_executed(text: str, judge: Any) -> None:
    assert judge.value(text) is None


def test_an_answer_is_right_that_comes_to_its_truth(judge: Any) -> None:
    answers = [Response(text, 3, hit_limit=False) for text in ("12+35", "12+45", "12+35=47", "47")]
    assert [share.hits for share in judge.right(answers, ["47"] * 4)] == [1, 0, 0, 0]
    assert [share.hits for share in judge.runs(answers, ["47"] * 4)] == [1, 1, 0, 0]
    assert judge.right.by_rule


def test_the_worlds_right_answers_are_right_and_its_notes_sloppy(judge: Any) -> None:
    held, rng = list(sums.sums(400, 0, held_out=True)), np.random.default_rng(0)
    assert all(judge.value(sums.expression(one)) == one.number for one in held)
    assert not {one.prompt for one in held} & {one.prompt for one in sums.sums(10**6, 1)}
    right = np.mean([judge.value(sums.noisy_answer(one, rng)) == one.number for one in held])
    assert 0.3 < right < 0.6
