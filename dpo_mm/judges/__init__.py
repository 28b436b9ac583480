"""Judges: functions that score images against prompts, or responses against ground truths.

An image judge is `score(images, prompts) -> list[float]`, one number per image. A response judge is
`score(responses, ground_truths) -> list[Ratio]`, one ratio per response. A rate is the sum of the hits divided by the
sum of the totals, as for CHAIR and character error rates. A pairwise judge returns, for each pair of images, the
probability that image a is better. A judge of edits is `score(images, prompts, sources)`: `sources` has a list of the images
to edit per image. No judge receives a policy.

To add a judge, write the function and list it in JUDGES in `table.py`. Or pass your own function as "module:function" to any setting
that expects a judge. The name of a judge that needs a model contains the model after a colon and the location of its
files after an @: `clip_score:ViT-B-32/openai@weights.safetensors`. Such a judge is opened once per process. Its weights
load when it scores for the first time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from PIL import Image

from dpo_mm.assets import recipes_folder
from dpo_mm.data.schema import Response
from dpo_mm.errors import did_you_mean
from dpo_mm.files.content_key import content_hash
from dpo_mm.judges.table import JUDGES, Better


class Ratio(NamedTuple):
    """One response's part in a rate: hits divided by a total. A total of 0 means that the judge skips this response."""

    hits: float
    total: float


class Explanation(NamedTuple):
    """A judge's explanation of one response.

    Attributes:
        reason: text, or "" if nothing is wrong.
        marks: start and end of each wrong span, in characters.
    """

    reason: str
    marks: tuple[tuple[int, int], ...] = ()


Score = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]
Prefer = Callable[[Sequence[Image.Image], Sequence[Image.Image], Sequence[str]], list[float]]
"""(images a, images b, prompts) -> probability that a is the better one of each pair, in [0, 1]. 1/2 is a tie."""
ResponseScore = Callable[[Sequence[Response], Sequence[str]], list[Ratio]]


class JudgeName(NamedTuple):
    """The parts of a judge's name, `judge:model@location`. A missing part is an empty string."""

    judge: str
    model: str
    location: str


class LazyJudge(NamedTuple):
    """A judge that needs a model: its function, its card, and what it reports. The first call loads the model."""

    function: Callable[..., Any]
    card: Callable[[], dict[str, Any]]
    take_notes: Callable[[], list[str]] = list


LIBRARIES = ("dpo-mm", "torch", "torchvision", "transformers", "open_clip_torch", "pillow", "numpy")
"""Libraries that can change a judge's numbers. Every card lists their versions."""


def parse_judge_name(name: str) -> JudgeName | None:
    """Split a judge's name into its parts. Return None if the judge is not in JUDGES (`module:function`)."""
    judge = re.split("[:@]", name, maxsplit=1)[0]
    if judge not in JUDGES or (judge != name and not JUDGES[judge].needs_model):
        return None
    model, _, location = name.removeprefix(judge).partition("@")
    return JudgeName(judge, model.removeprefix(":"), location)


def load_judge(name: str) -> Any:
    """Load a judge's scoring function.

    Args:
        name: a name in JUDGES, or `module:function`.

    Raises:
        ValueError: if the judge is unknown, its files are missing, or it is a pairwise judge.
    """
    _refuse_questions(name)
    if is_pairwise(name):
        raise ValueError(f"judge {name!r} compares two images and does not score one. Use it with dpo-mm relabel.")
    return _judge_function(name)


def load_pairwise(name: str) -> Prefer:
    """Load the function of a pairwise judge.

    Raises:
        ValueError: if the judge is unknown, its files are missing, or it scores single images.
    """
    _refuse_questions(name)
    if not is_pairwise(name):
        raise ValueError(f"judge {name!r} scores single images. Expected a judge that compares two images.")
    return _judge_function(name)


def _refuse_questions(name: str) -> None:
    """Raise ValueError for a judge that takes questions."""
    if takes_questions(name):
        raise ValueError(f"judge {name!r} scores responses to questions. Use it with compare or mine, and --questions.")


def load_response_judge(name: str) -> Any:
    """Load the function of a judge of responses, also of one that takes questions. Raise ValueError as `load_judge`."""
    return _judge_function(name) if takes_questions(name) else load_judge(name)


def check_outputs(name: str, outputs: Literal["images", "responses"]) -> None:
    """Raise ValueError for a judge whose first parameter is named after the other kind of outputs."""
    first = next(iter(inspect.signature(_judge_function(name)).parameters), "")
    if first in ("images", "responses") and first != outputs:
        raise ValueError(
            f"judge {name!r} scores {first}, not {outputs}. Choose another judge, or the command for {first}"
        )


def check_prompts(names: Sequence[str], prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt that one of the judges cannot score, before images are generated for it."""
    for name in names:
        path = JUDGES[name].check_prompts if name in JUDGES else None
        if path:
            _import_function(name, path)(prompts)


def take_judge_notes(names: Sequence[str]) -> list[str]:
    """Return what judges that take questions report of the scores since the last call: tokens, and rows without a score."""
    return [note for name in names if takes_questions(name) for note in _lazy_judge(name).take_notes()]


def _judge_function(name: str) -> Any:
    parsed = parse_judge_name(name)
    if parsed and JUDGES[parsed.judge].needs_model:
        return _lazy_judge(name).function
    return _import_function(name, JUDGES[parsed.judge].function if parsed else name)


@functools.cache
def _lazy_judge(name: str) -> LazyJudge:
    parsed = parse_judge_name(name)
    assert parsed is not None
    lazy_judge: LazyJudge = _import_function(name, JUDGES[parsed.judge].function)(parsed)
    return lazy_judge


def _import_function(name: str, target: str) -> Any:
    module, colon, function = target.partition(":")
    if not colon:
        raise ValueError(
            f"judge {name!r} is unknown; {did_you_mean(name, JUDGES)} (A custom judge is written as module:function.)"
        )
    try:
        return getattr(_import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"judge {name!r} cannot be imported ({error}). Expected an importable module:function."
        ) from error


def _import_module(name: str) -> ModuleType:
    """Import a module, or a bundled recipe (`custom_judge`), which is importable from any working directory.

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
    """Name of the metric of a judge in reports, followed by the model in its name if there is one."""
    parsed = parse_judge_name(name)
    if parsed is None:
        return name.rpartition(":")[2]
    model = Path(parsed.model).name if Path(parsed.model).is_dir() else parsed.model
    return f"{JUDGES[parsed.judge].metric} ({model})" if model else JUDGES[parsed.judge].metric


def better_of(name: str) -> Better:
    """Direction in which a judge's score improves. A custom judge sets it with the attribute `better` (default: higher)."""
    parsed = parse_judge_name(name)
    return JUDGES[parsed.judge].better if parsed else getattr(_judge_function(name), "better", "higher")


def is_pairwise(name: str) -> bool:
    """Check if a judge compares two images. A custom judge declares it with the attribute `pairwise`."""
    parsed = parse_judge_name(name)
    return JUDGES[parsed.judge].pairwise if parsed else bool(getattr(_judge_function(name), "pairwise", False))


def takes_questions(name: str) -> bool:
    """Check if a judge scores responses to questions, not images and not against ground truths alone."""
    parsed = parse_judge_name(name)
    return parsed is not None and JUDGES[parsed.judge].takes_questions


def takes_sources(name: str) -> bool:
    """Check if a judge scores edits, so that it needs the images to edit. A custom judge declares it with this attribute."""
    parsed = parse_judge_name(name)
    return (
        JUDGES[parsed.judge].takes_sources if parsed else bool(getattr(_judge_function(name), "takes_sources", False))
    )


def judge_card(name: str) -> dict[str, Any]:
    """Describe a judge so that its numbers can be reproduced.

    The files are read for their hash, but no weights are loaded.

    Returns:
        JSON values: name, metric, better, pairwise, versions. For a judge with a model also model, formula, weights by
        file name (sha256, published), preprocessing and template. For any other judge also the function and the sha256
        of its source file.

    Raises:
        ValueError: if the judge is unknown or its files are missing.
    """
    parsed, function = parse_judge_name(name), _judge_function(name)
    card: dict[str, Any] = {
        "name": name,
        "metric": metric_of(name),
        "better": better_of(name),
        "pairwise": is_pairwise(name),
    }
    if parsed and JUDGES[parsed.judge].needs_model:
        card |= _lazy_judge(name).card()
    else:
        card |= _function_card(function)
    return card | {"versions": {library: _version(library) for library in LIBRARIES}}


def judge_digests(names: Sequence[str]) -> dict[str, str]:
    """Hash the cards of judges, by name. Another model, formula, argument or code is another judge."""
    return {name: content_hash(json.loads(json.dumps(judge_card(name), default=str))) for name in names}


def _function_card(function: Any) -> dict[str, str | None]:
    """Path of a function and the hash of its source file. A partial or a callable object is unwrapped first."""
    state = [getattr(function, "args", ()), getattr(function, "keywords", {}), getattr(function, "__dict__", {})]
    try:
        arguments = content_hash([part for part in state if part]) if any(state) else None
    except TypeError:  # an object of unknown content, such as a model
        arguments = None
    inner: Any = inspect.unwrap(getattr(function, "func", function))
    inner = inner if hasattr(inner, "__qualname__") else type(inner)
    try:
        source = inspect.getsourcefile(inner)
    except TypeError:
        source = None
    code = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None
    return {"function": f"{inner.__module__}:{inner.__qualname__}", "code_sha256": code, "arguments": arguments}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def explain(name: str, response: Response, ground_truth: str) -> Explanation:
    """Explain the faults of a response by a judge. The explanation is empty if the judge gives none."""
    path = JUDGES[name].explain if name in JUDGES else None
    return load_judge(path)(response, ground_truth) if path else Explanation("")


def correct(name: str, response: Response, ground_truth: str) -> str:
    """Correct the faults of a response by a judge and leave the rest unchanged.

    Raises:
        ValueError: if the judge has no correction.
    """
    path = JUDGES[name].correct if name in JUDGES else None
    if path is None:
        correcting = ", ".join(other for other, judge in JUDGES.items() if judge.correct)
        raise ValueError(
            f"judge {name!r} cannot correct a response. Set chosen: ground_truth, or use one of {correcting}."
        )
    text: str = load_judge(path)(response, ground_truth)
    return text
