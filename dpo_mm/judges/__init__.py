"""Judges: functions that score pictures against their prompts, or answers against the truth. No judge sees a policy.

Of pictures: `score(images, prompts) -> [one number a picture]`. Of answers: `score(answers, truths) -> [one Share an
answer]`, so that a rate is the sum of its hits over the sum of what it counts, as CHAIR and character error rates are.
To add one: write the function and name it in JUDGES, or name your own as "module:function" wherever a judge is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from dpo_mm.config import nearest
from dpo_mm.schema import Answer

Better = Literal["higher", "lower", "neither"]


class Share(NamedTuple):
    """So many hits of so many: one answer's part in a rate. of 0: the judge has nothing to say of this answer."""

    hits: float
    of: float


class Finding(NamedTuple):
    """What a judge found wrong with one answer: in words ("" for nothing), and where, in characters."""

    reason: str
    marks: tuple[tuple[int, int], ...] = ()


Score = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]
AnswerScore = Callable[[Sequence[Answer], Sequence[str]], list[Share]]


@dataclass(frozen=True)
class Judge:
    """A judge by name: what it measures, in a report's words, where its function stands, and which way is better.

    explain: where a function stands that says of (answer, truth) what is wrong, as a Finding. correct: one that gives the
    answer with that mended and nothing else, as text.
    """

    metric: str
    function: str
    better: Better = "higher"
    explain: str | None = None
    correct: str | None = None


_TEXT, _CAPTION = "dpo_mm.judges.text", "dpo_mm.judges.captions"
_YES_NO = "dpo_mm.judges.yes_no"
JUDGES: dict[str, Judge] = {
    "faithfulness": Judge("wholly right rate", "dpo_mm.judges.scene:faithfulness"),
    "aesthetic": Judge("aesthetic score", "dpo_mm.judges.aesthetic:aesthetic"),
    "degeneration": Judge("degeneration rate", f"{_TEXT}:degeneration", "lower", f"{_TEXT}:explain_loop", f"{_TEXT}:correct_loop"),
    "runaway": Judge("runaway rate", f"{_TEXT}:runaway", "lower", f"{_TEXT}:explain_loop", f"{_TEXT}:correct_loop"),
    "repetition": Judge("excess repetition, share", f"{_TEXT}:repetition", "lower", f"{_TEXT}:explain_loop", f"{_TEXT}:correct_loop"),
    "cer": Judge("character error rate", f"{_TEXT}:cer", "lower"),
    "wer": Judge("word error rate", f"{_TEXT}:wer", "lower"),
    "anls": Judge("ANLS", f"{_TEXT}:anls"),
    "valid_json": Judge("valid JSON rate", f"{_TEXT}:valid_json"),
    "cap_hit": Judge("cut at the limit, rate", f"{_TEXT}:cap_hit", "lower"),
    "tokens": Judge("tokens an answer", f"{_TEXT}:tokens", "lower"),
    "words": Judge("words an answer", f"{_TEXT}:words", "neither"),
    "chair_i": Judge("CHAIR_i", f"{_CAPTION}:chair_i", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "chair_s": Judge("CHAIR_s", f"{_CAPTION}:chair_s", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "faults": Judge("inventions and omissions", f"{_CAPTION}:faults", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "recall": Judge("object recall", f"{_CAPTION}:recall"),
    "pope_accuracy": Judge("yes or no, accuracy", f"{_YES_NO}:accuracy"),
    "pope_precision": Judge("yes, precision", f"{_YES_NO}:precision"),
    "pope_recall": Judge("yes, recall", f"{_YES_NO}:recall"),
    "pope_f1": Judge("yes, F1", f"{_YES_NO}:f1"),
    "yes_ratio": Judge("share of yes", f"{_YES_NO}:yes_ratio", "neither"),
}  # fmt: skip


def load_judge(name: str) -> Any:
    """A judge's function by its name in JUDGES or as module:function. Raises ValueError where there is none."""
    target = JUDGES[name].function if name in JUDGES else name
    module, colon, function = target.partition(":")
    if not colon:
        raise ValueError(f"judge {name!r} is unknown; {nearest(name, JUDGES)}, or give your own as module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {name!r} can't be loaded ({error}); expected an importable module:function") from error


def metric_of(name: str) -> str:
    """What a judge measures, in the words of a report."""
    return JUDGES[name].metric if name in JUDGES else name.rpartition(":")[2]


def better_of(name: str) -> Better:
    """Which way is better; for a judge of your own its function's attribute `better`, or higher."""
    return JUDGES[name].better if name in JUDGES else getattr(load_judge(name), "better", "higher")


def judge_card(name: str) -> dict[str, Any]:
    """What a report has to say of a judge so that its numbers can be had again, as plain values that JSON can hold."""
    function = load_judge(name)
    source = inspect.getsourcefile(inspect.unwrap(function))
    code = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None
    return {"name": name, "function": f"{function.__module__}:{function.__qualname__}", "code_sha256": code}


def explain(name: str, answer: Answer, truth: str) -> Finding:
    """What a judge found wrong with an answer; nothing where it doesn't say."""
    where = JUDGES[name].explain if name in JUDGES else None
    return load_judge(where)(answer, truth) if where else Finding("")


def correct(name: str, answer: Answer, truth: str) -> str:
    """An answer with what a judge found wrong mended, and nothing else. Raises ValueError for a judge that can't."""
    where = JUDGES[name].correct if name in JUDGES else None
    if where is None:
        able = ", ".join(one for one, judge in JUDGES.items() if judge.correct)
        raise ValueError(f"judge {name!r} does not say how to correct an answer; take chosen: truth, or one of {able}")
    text: str = load_judge(where)(answer, truth)
    return text
