"""Judges: functions that score pictures against their prompts, or answers against the truth. No judge sees a policy.

Of pictures: `score(images, prompts) -> [one number a picture]`. Of answers: `score(answers, truths) -> [one Share an
answer]`, so that a rate is the sum of its hits over the sum of what it counts, as CHAIR and character error rates are.
A judge of two pictures side by side says for each pair how likely a is the better one.
To add one: write the function and name it in JUDGES, or name your own as "module:function" wherever a judge is asked for.
A judge that needs a model is named with it, as in `clip_score:ViT-B-32/openai@weights.safetensors`: the judge, its model
after a colon, and after an @ where its files are. It is opened once a process, and its weights load when it first judges.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from PIL import Image

from dpo_mm.assets import recipes_folder
from dpo_mm.data.schema import Response
from dpo_mm.errors import did_you_mean

Better = Literal["higher", "lower", "neutral"]


class Ratio(NamedTuple):
    """So many hits of so many: one answer's part in a rate. of 0: the judge has nothing to say of this answer."""

    hits: float
    of: float


class Explanation(NamedTuple):
    """What a judge found wrong with one answer: in words ("" for nothing), and where, in characters."""

    reason: str
    marks: tuple[tuple[int, int], ...] = ()


Score = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]
Prefer = Callable[[Sequence[Image.Image], Sequence[Image.Image], Sequence[str]], list[float]]
"""(pictures a, pictures b, prompts) -> how likely a is the better one of each pair, [0, 1]; 1/2 is a tie."""
ResponseScore = Callable[[Sequence[Response], Sequence[str]], list[Ratio]]


class JudgeName(NamedTuple):
    """A judge's name in its parts: `judge:model@where`; what is not said is empty."""

    judge: str
    model: str
    where: str


class LazyJudge(NamedTuple):
    """A judge that needs a model: its function (Score or Prefer), which loads the model at its first call, and its card."""

    function: Callable[..., list[float]]
    card: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Judge:
    """A judge by name: what it measures, in a report's words, where its function stands, and which way is better.

    explain: where a function stands that says of (answer, truth) what is wrong, as a Finding. correct: one that gives the
    answer with that mended and nothing else, as text. opens: the function takes a Named and gives an Opened. pairwise: it
    is a Prefer, not a Score. reads: it looks at the prompt.
    """

    metric: str
    function: str
    better: Better = "higher"
    explain: str | None = None
    correct: str | None = None
    opens: bool = False
    pairwise: bool = False
    reads: bool = True


_TEXT, _CAPTION = "dpo_mm.judges.text", "dpo_mm.judges.captions"
_CLIP, _VQA, _ATOMS = "dpo_mm.judges.clip", "dpo_mm.judges.vqa", "dpo_mm.judges.soft_tifa"
_YES_NO = "dpo_mm.judges.pope"
JUDGES: dict[str, Judge] = {
    "faithfulness": Judge("wholly right rate", "dpo_mm.judges.scene:faithfulness"),
    "aesthetic": Judge("aesthetic score", "dpo_mm.judges.aesthetic:aesthetic", reads=False),
    "clip_score": Judge("CLIPScore, 2.5 max(cos, 0)", f"{_CLIP}:clip_score", opens=True),
    "laion_aesthetic": Judge("LAION aesthetic v2, 1 to 10", f"{_CLIP}:laion_aesthetic", opens=True, reads=False),
    "hps_v2": Judge("HPS v2, cos", f"{_CLIP}:hps_v2", opens=True),
    "hps_v2.1": Judge("HPS v2.1, cos", f"{_CLIP}:hps_v21", opens=True),
    "pick_score": Judge("PickScore v1, exp(s) cos", f"{_CLIP}:pick_score", opens=True),
    "vqa_score": Judge("VQAScore, P(Yes)", f"{_VQA}:vqa_score", opens=True),
    "vlm_prefers": Judge("preferred by a VLM in both orders", f"{_VQA}:vlm_prefers", opens=True, pairwise=True),
    "soft_tifa_gm": Judge("Soft-TIFA GM", f"{_ATOMS}:soft_tifa_gm", opens=True),
    "soft_tifa_am": Judge("Soft-TIFA AM", f"{_ATOMS}:soft_tifa_am", opens=True),
    "degeneration": Judge("degeneration rate", f"{_TEXT}:degeneration", "lower", f"{_TEXT}:explain_loop", f"{_TEXT}:correct_loop"),
    "trailing_repetition": Judge("runaway rate", f"{_TEXT}:trailing_repetition", "lower", f"{_TEXT}:explain_loop", f"{_TEXT}:correct_loop"),
    "repetition": Judge("excess repetition, share", f"{_TEXT}:repetition", "lower", f"{_TEXT}:explain_loop", f"{_TEXT}:correct_loop"),
    "cer": Judge("character error rate", f"{_TEXT}:cer", "lower"),
    "wer": Judge("word error rate", f"{_TEXT}:wer", "lower"),
    "anls": Judge("ANLS", f"{_TEXT}:anls"),
    "valid_json": Judge("valid JSON rate", f"{_TEXT}:valid_json"),
    "truncated": Judge("cut at the limit, rate", f"{_TEXT}:truncated", "lower"),
    "num_tokens": Judge("tokens an answer", f"{_TEXT}:num_tokens", "lower"),
    "num_words": Judge("words an answer", f"{_TEXT}:num_words", "neutral"),
    "chair_i": Judge("CHAIR_i", f"{_CAPTION}:chair_i", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "chair_s": Judge("CHAIR_s", f"{_CAPTION}:chair_s", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "hallucination_f1_error": Judge("inventions and omissions", f"{_CAPTION}:hallucination_f1_error", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "recall": Judge("object recall", f"{_CAPTION}:recall"),
    "pope_accuracy": Judge("yes or no, accuracy", f"{_YES_NO}:accuracy"),
    "pope_precision": Judge("yes, precision", f"{_YES_NO}:precision"),
    "pope_recall": Judge("yes, recall", f"{_YES_NO}:recall"),
    "pope_f1": Judge("yes, F1", f"{_YES_NO}:f1"),
    "yes_ratio": Judge("share of yes", f"{_YES_NO}:yes_ratio", "neutral"),
}  # fmt: skip


LIBRARIES = ("dpo-mm", "torch", "torchvision", "transformers", "open_clip_torch", "pillow", "numpy")
"""What a judge's numbers may hang on, named with its version in every card."""


def parse_judge_name(name: str) -> JudgeName | None:
    """A name's parts where its judge stands in JUDGES; None for a module:function."""
    judge = re.split("[:@]", name, maxsplit=1)[0]
    if judge not in JUDGES or (judge != name and not JUDGES[judge].opens):
        return None
    model, _, where = name.removeprefix(judge).partition("@")
    return JudgeName(judge, model.removeprefix(":"), where)


def load_judge(name: str) -> Any:
    """A judge's function by its name in JUDGES or as module:function.

    Raises ValueError where there is none, where its files are not there, or where it compares pictures side by side.
    """
    if is_pairwise(name):
        raise ValueError(f"judge {name!r} compares two pictures and scores none; use it with dpo-mm relabel")
    return _function(name)


def load_pairwise(name: str) -> Prefer:
    """The function of a judge that compares pictures side by side. Raises ValueError as `load_judge`."""
    if not is_pairwise(name):
        raise ValueError(f"judge {name!r} scores pictures one by one; expected one that compares two")
    return _function(name)


def _function(name: str) -> Any:
    found = parse_judge_name(name)
    if found and JUDGES[found.judge].opens:
        return _opened(name).function
    return _import(name, JUDGES[found.judge].function if found else name)


@functools.cache
def _opened(name: str) -> LazyJudge:
    found = parse_judge_name(name)
    assert found is not None
    opened: LazyJudge = _import(name, JUDGES[found.judge].function)(found)
    return opened


def _import(name: str, target: str) -> Any:
    module, colon, function = target.partition(":")
    if not colon:
        raise ValueError(
            f"judge {name!r} is unknown; {did_you_mean(name, JUDGES)}, or give your own as module:function"
        )
    try:
        return getattr(_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {name!r} can't be loaded ({error}); expected an importable module:function") from error


def _module(name: str) -> ModuleType:
    """Import a module. A bundled recipe is one too, wherever Python was started: `custom_judge` is in its preset.

    Raises ImportError if neither exists.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        script = recipes_folder() / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, script) if error.name == name else None
        if spec is None or spec.loader is None or not script.is_file():
            raise
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def metric_of(name: str) -> str:
    """What a judge measures, in the words of a report, with the model that it was named with."""
    found = parse_judge_name(name)
    if found is None:
        return name.rpartition(":")[2]
    model = Path(found.model).name if Path(found.model).is_dir() else found.model
    return f"{JUDGES[found.judge].metric} ({model})" if model else JUDGES[found.judge].metric


def better_of(name: str) -> Better:
    """Which way is better; for a judge of your own its function's attribute `better`, or higher."""
    found = parse_judge_name(name)
    return JUDGES[found.judge].better if found else getattr(_function(name), "better", "higher")


def is_pairwise(name: str) -> bool:
    """Whether a judge compares two pictures; one of your own says so by its function's attribute `pairwise`."""
    found = parse_judge_name(name)
    return JUDGES[found.judge].pairwise if found else bool(getattr(_function(name), "pairwise", False))


def judge_card(name: str) -> dict[str, Any]:
    """What a report has to say of a judge so that its numbers can be had again, as plain values that JSON can hold.

    name, metric, better, pairwise, versions; with a model: model, formula, weights by file name (sha256, published),
    preprocessing, template; else function and the sha256 of the file it stands in. Loads no weights, but reads them for
    their hash. Raises ValueError as `load_judge`.
    """
    found, function = parse_judge_name(name), _function(name)
    about: dict[str, Any] = {
        "name": name,
        "metric": metric_of(name),
        "better": better_of(name),
        "pairwise": is_pairwise(name),
    }
    if found and JUDGES[found.judge].opens:
        about |= _opened(name).card()
    else:
        about |= _code(function)
    return about | {"versions": {library: _version(library) for library in LIBRARIES}}


def _code(function: Any) -> dict[str, str | None]:
    """Where a function (or what a partial or an object with __call__ stands for) is written, and the hash of that file."""
    inner: Any = inspect.unwrap(getattr(function, "func", function))
    inner = inner if hasattr(inner, "__qualname__") else type(inner)
    try:
        source = inspect.getsourcefile(inner)
    except TypeError:
        source = None
    code = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None
    return {"function": f"{inner.__module__}:{inner.__qualname__}", "code_sha256": code}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def explain(name: str, answer: Response, truth: str) -> Explanation:
    """What a judge found wrong with an answer; nothing where it doesn't say."""
    where = JUDGES[name].explain if name in JUDGES else None
    return load_judge(where)(answer, truth) if where else Explanation("")


def correct(name: str, answer: Response, truth: str) -> str:
    """An answer with what a judge found wrong mended, and nothing else. Raises ValueError for a judge that can't."""
    where = JUDGES[name].correct if name in JUDGES else None
    if where is None:
        able = ", ".join(one for one, judge in JUDGES.items() if judge.correct)
        raise ValueError(
            f"judge {name!r} does not say how to correct an answer; take chosen: ground_truth, or one of {able}"
        )
    text: str = load_judge(where)(answer, truth)
    return text
