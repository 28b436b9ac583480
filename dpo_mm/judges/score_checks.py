"""Call judges and check what they return. Every score that the package uses comes through this module.

A custom judge may return numbers, arrays or tensors of any dtype, one per row or with a second dimension of 1. Other
shapes, texts and values that are not finite are refused with the judge and the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response
from dpo_mm.judges import (
    better_of,
    is_pairwise,
    load_judge,
    load_pairwise,
    load_response_judge,
    takes_questions,
    takes_sources,
)
from dpo_mm.judges.table import JUDGES


def image_scores(
    name: str,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    sources: Sequence[Sequence[Image.Image]] = (),
) -> np.ndarray:
    """Score images with a judge.

    Args:
        name: name of the judge.
        images: the images.
        prompts: prompt of each image.
        sources: images to edit of each image, for judges that take them. Empty: the prompts have none.

    Returns:
        One finite score per image, (images,), float64.

    Raises:
        ValueError: if the judge returns anything else, or takes images to edit and there are none.
    """
    judge, rows = load_judge(name), [f"prompt {prompt!r}" for prompt in prompts]
    if takes_sources(name):
        if len(sources) != len(images) or not all(sources):
            raise ValueError(
                f"judge {name!r} scores edits, so it needs the image to edit of every prompt. Use it with compare or mine, and "
                "prompts with images, or judge rows with image_source"
            )
        values = _numbers(name, judge(images, prompts, [list(each) for each in sources]), rows)
    else:
        values = _numbers(name, judge(images, prompts), rows)
    return _column(name, values, len(prompts), "image")


def higher_is_better_scores(
    name: str,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    sources: Sequence[Sequence[Image.Image]] = (),
) -> np.ndarray:
    """Score images as `image_scores`, with the sign flipped if lower is better."""
    scores = image_scores(name, images, prompts, sources)
    return -scores if better_of(name) == "lower" else scores


def pair_probabilities(
    name: str, a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]
) -> np.ndarray:
    """Compare pairs of images with a pairwise judge.

    Returns:
        Probability that a is better, (pairs,), in [0, 1].

    Raises:
        ValueError: if the judge returns anything else.
    """
    rows = [f"prompt {prompt!r}" for prompt in prompts]
    values = _column(name, _numbers(name, load_pairwise(name)(a, b, prompts), rows), len(rows), "pair")
    outside = np.flatnonzero((values < 0) | (values > 1))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"judge {name!r} returned {values[first]:g} for {rows[first]}. Expected a probability from 0 to 1."
        )
    return values


def score_pairs(
    name: str,
    a: Sequence[Image.Image],
    b: Sequence[Image.Image],
    prompts: Sequence[str],
    sources: Sequence[Sequence[Image.Image]],
) -> np.ndarray:
    """Score pairs with a judge, (pairs, 2), higher is better. A pairwise judge gives the probabilities of a and of b.

    Args:
        name: the judge.
        a, b: both images of each pair.
        prompts: prompt of each pair.
        sources: images to edit of each pair, for judges that take them.

    Raises:
        ValueError: if a score is not a finite number.
    """
    if is_pairwise(name):
        p_a = pair_probabilities(name, a, b, prompts)
        return np.stack([p_a, 1 - p_a], axis=1)
    return higher_is_better_scores(name, [*a, *b], [*prompts, *prompts], [*sources, *sources]).reshape(2, -1).T


def response_ratios(
    name: str,
    responses: Sequence[Response],
    ground_truths: Sequence[Sequence[str]],
    questions: Sequence[Question] = (),
) -> np.ndarray:
    """Score responses with a judge, each against the correct response that suits it best.

    Args:
        name: name of the judge.
        responses: the responses.
        ground_truths: correct responses of each, at least one, of which any is right.
        questions: question of each, for judges that take questions.

    Returns:
        Hits and total of each response, (responses, 2), float64. The total is 0 if a judge that takes questions has no score.

    Raises:
        ValueError: if the judge returns anything else.
    """
    if takes_questions(name):
        assert len(questions) == len(responses)
        return np.array(load_response_judge(name)(responses, questions), dtype=np.float64).reshape(-1, 2)
    owners = [number for number, truths in enumerate(ground_truths) for _ in truths]
    rows = [f"response {number} ({responses[number].text[:60]!r})" for number in owners]
    returned = load_judge(name)(
        [responses[number] for number in owners], [t for truths in ground_truths for t in truths]
    )
    values = _numbers(name, returned, rows)
    if values.shape != (len(rows), 2):
        raise ValueError(
            f"judge {name!r} returned {values.shape} for {len(rows)} responses. Return one Ratio (hits, total) per response."
        )
    negative = np.flatnonzero(values[:, 1] < 0)
    if len(negative):
        raise ValueError(f"judge {name!r} returned a total below 0 for {rows[int(negative[0])]}. Expected at least 0.")
    sign = {"higher": 1.0, "lower": -1.0, "neutral": 0.0}[better_of(name)]
    hits, totals = values.T
    rates = np.divide(sign * hits, totals, out=np.full(len(rows), -np.inf), where=totals > 0)
    best: dict[int, int] = {}
    for index, owner in enumerate(owners):
        if owner not in best or rates[index] > rates[best[owner]]:
            best[owner] = index
    return values[[best[number] for number in range(len(responses))]].reshape(-1, 2)


def check_ground_truths(names: Sequence[str], questions: Sequence[Question]) -> None:
    """Raise ValueError for a judge that cannot read the ground truth of the first question, before responses are generated.

    Judges with a model and custom ones are not checked, because their first call may take long.
    """
    first = next((question for question in questions if question.has_ground_truth), None)
    for name in names:
        if first is not None and name in JUDGES and not JUDGES[name].needs_model:
            load_judge(name)([Response("", 0, hit_limit=False)], [first.ground_truth])


def response_preferences(
    name: str, a: Sequence[Response], b: Sequence[Response], questions: Sequence[Question]
) -> tuple[np.ndarray, np.ndarray]:
    """Compare pairs of responses with a pairwise judge.

    Returns:
        Hits and total of a and of b, (pairs, 2) each, float64: 1 hit for the preferred response, half a hit each for a tie, a total
        of 0 without a preference.
    """
    first = np.array(load_response_judge(name)(a, b, questions), dtype=np.float64).reshape(-1, 2)
    return first, np.stack([first[:, 1] - first[:, 0], first[:, 1]], 1)


def _column(name: str, values: np.ndarray, count: int, kind: str) -> np.ndarray:
    """Return values of shape (count,) or (count, 1) as (count,)."""
    if values.shape not in ((count,), (count, 1)):
        shape = f"{len(values)} scores" if values.ndim == 1 else f"the shape {values.shape}"
        raise ValueError(f"judge {name!r} returned {shape} for {count} {kind}s. Return one score per {kind}.")
    return values.reshape(count)


def _numbers(name: str, values: Any, rows: Sequence[str]) -> np.ndarray:
    """Convert a judge's return value to finite float64, whatever its shape. rows: names of the rows."""
    try:
        array = np.asarray(_plain(values))
        if array.dtype.kind not in "biufO":
            raise TypeError(f"values of type {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"judge {name!r} did not return one number per row ({reason}).") from error
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        number = int(wrong[0][0]) if array.ndim else 0
        row = rows[number] if number < len(rows) else f"row {number}"
        raise ValueError(f"judge {name!r} returned {array[tuple(wrong[0])]} for {row}. Expected a finite number.")
    return array


def _plain(values: Any) -> Any:
    """Replace tensors of any dtype, with or without gradient, by arrays, also inside lists, and texts by an error."""
    if hasattr(values, "detach"):
        return values.detach().cpu().double().numpy()
    if isinstance(values, np.ndarray | int | float | None):
        return values
    if isinstance(values, str | bytes | dict):
        raise TypeError(f"{type(values).__name__} {str(values)[:40]!r}")
    return [_plain(value) for value in values] if hasattr(values, "__iter__") else float(values)
