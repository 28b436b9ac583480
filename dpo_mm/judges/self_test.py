"""Self-test of a judge: checks, without a dataset, that the judge on this machine is the one of its name.

The files are compared with the sha256 that their authors published. Scores must be the same twice, and the same one by
one as in batches. Images of the synthetic shapes must score higher with their own captions than with others'. Golden
values are compared if any are public:

- clip_score with OpenAI's ViT-B/32: the label probabilities of CLIP.png in the README of github.com/openai/CLIP, which
  also contains the image (sha256 308a3ca4...). They come from half precision, hence the tolerance.
- laion_aesthetic: its head at three embeddings, computed by the project from the published file with numpy in float64.

For PickScore, HPS, VQAScore and Soft-TIFA no published score with its image was found, so none is recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.errors import one_line
from dpo_mm.judges import (
    JUDGES,
    is_pairwise,
    judge_card,
    load_judge,
    load_pairwise,
    parse_judge_name,
    takes_sources,
)
from dpo_mm.worlds import drawing_prompts, drawings, shape_edits, shapes

CAPTIONS = ("a red circle", "a blue square", "a green triangle", "a yellow star")
DRAWING_CAPTIONS = ("a penguin", "two red apples", "a cat left of a train", "a banana, an owl and a crab on white")
CLIP_PNG_SHA256 = "308a3ca4503f1c7a07803916c369d78c4ef501e5ab7fc727da9b5e1d2f9ec85b"
CLIP_LABELS = ("a diagram", "a dog", "a cat")
CLIP_PROBABILITIES = (0.9927937, 0.00421068, 0.00299572)
HEAD_VALUES = {"zeros": 5.23664585, "ones": 4.88328485, "one, then zeros": 4.54505240}
"""Golden values of LAION's head at three embeddings."""


class CheckResult(NamedTuple):
    """Result of one check.

    Attributes:
        name: name of the check.
        passed: None if the check does not apply.
        observed: observed values.
    """

    name: str
    passed: bool | None
    observed: str


CAPTIONS_NOT_APPLICABLE = CheckResult(
    "captions", None, "this judge ignores prompts, or only scores the prompts of its questions"
)


def self_test(name: str, reference_image: str | None = None) -> Iterator[CheckResult]:
    """Run the checks of a judge, one after another.

    Args:
        name: the judge.
        reference_image: path of CLIP.png, for the golden values that need it.

    Raises:
        ValueError: if the judge is unknown, its files are missing, or a custom judge fails on images.
    """
    card, parsed = judge_card(name), parse_judge_name(name)
    yield from check_weights(card)
    images, prompts = captioned_images(name, parsed.location if parsed and "questions" in card else None)
    if is_pairwise(name):
        yield from check_pairwise(name, images, prompts)
        return
    judge = load_judge(name)
    if takes_sources(name):
        images, prompts, judge = edited_images(judge)
    try:
        batched = np.array(judge(images, prompts), dtype=float)
    except Exception as error:
        if parsed:
            raise
        raise ValueError(
            f"judge {name!r} fails on images: {one_line(error)}. Correct it. If it is a judge of responses, call it on a few of them "
            "instead: the self-test has only images"
        ) from error
    repeated = np.array(judge(images, prompts))
    yield CheckResult("same scores twice", bool((batched == repeated).all()), "the same images, scored twice")
    single = np.array([judge([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)])
    difference = float(np.abs(single - batched).max())
    yield CheckResult(
        "same scores in batches",
        difference <= tolerance(card, batched),
        f"largest difference between one by one and batched: {difference:.2g}",
    )
    uses_prompt = JUDGES[parsed.judge].uses_prompt if parsed else getattr(judge, "uses_prompt", True)
    if uses_prompt and "questions" not in card and not takes_sources(name):
        yield check_captions(judge, images, prompts, min_difference=tolerance(card, batched))
    else:
        yield CAPTIONS_NOT_APPLICABLE
    yield check_golden_values(name, judge, card, reference_image)


def edited_images(judge: Any) -> tuple[list[Image.Image], list[str], Any]:
    """Edits of the synthetic shapes, half of them done: images, instructions, and the judge with the images to edit."""
    tasks = list(shape_edits.tasks(4, seed=0))
    images = [shapes.render(task.source if n % 2 else task.target) for n, task in enumerate(tasks)]
    sources = {task.instruction: [shapes.render(task.source)] for task in tasks}
    score = lambda images, prompts: judge(images, prompts, [sources[prompt] for prompt in prompts])
    return images, [task.instruction for task in tasks], score


def check_weights(card: dict[str, Any]) -> Iterator[CheckResult]:
    """Compare the files in a card with their published sha256."""
    for file, weights in card.get("weights", {}).items():
        published = weights["published"]
        text = {True: "as published", False: "NOT as published", None: "no published sha256 is recorded"}
        yield CheckResult(f"weights {file}", published, f"sha256 {weights['sha256']}, {text[published]}")


def captioned_images(name: str, questions: str | None) -> tuple[list[Image.Image], list[str]]:
    """Images of the synthetic shapes, or of the drawings for their judges, with captions or the first prompts of a file of questions."""
    if name.startswith("drawings_"):
        requests = [drawing_prompts.parse(text) for text in DRAWING_CAPTIONS]
        drawing_scenes = [drawings.scene_of(request, np.random.default_rng(n)) for n, request in enumerate(requests)]
        return [drawings.render(scene) for scene in drawing_scenes], list(DRAWING_CAPTIONS)
    scenes = [shapes.sample_scene(shapes.parse(text), np.random.default_rng(n)) for n, text in enumerate(CAPTIONS)]
    images = [shapes.render(scene) for scene in scenes]
    if questions is None:
        return images, list(CAPTIONS)
    from dpo_mm.judges.soft_tifa import read_questions

    prompts = itertools.cycle(read_questions(Path(questions).expanduser()))
    return images, [next(prompts) for _ in images]


def tolerance(card: dict[str, Any], scores: np.ndarray) -> float:
    """Largest rounding error of a score: that of half precision for a VLM on a GPU, else that of float32."""
    import torch

    largest = max(1.0, float(np.abs(scores).max()))
    return largest * (2e-2 if "template" in card and torch.cuda.is_available() else 1e-4)


def check_captions(
    judge: Any, images: Sequence[Image.Image], prompts: Sequence[str], *, min_difference: float
) -> CheckResult:
    """Check that images score higher on average with their own captions than with others', by `min_difference`."""
    rows = [(image, prompt) for image in images for prompt in prompts]
    scores = np.array(judge([image for image, _ in rows], [prompt for _, prompt in rows])).reshape(len(images), -1)
    own = float(np.diag(scores).mean())
    other = float((scores.sum() - np.diag(scores).sum()) / (scores.size - len(images)))
    observed = f"mean score with own captions {own:.4f}, with others' {other:.4f} ({len(images)} images)"
    return CheckResult("captions", own - other > min_difference, observed)


def check_golden_values(name: str, judge: Any, card: dict[str, Any], reference_image: str | None) -> CheckResult:
    """Compare with golden values if they are public, or report what the check needs."""
    parsed = parse_judge_name(name)
    if parsed and parsed.judge == "laion_aesthetic":
        return check_laion_head(name, card)
    if not parsed or parsed.judge != "clip_score" or "ViT-B-32" not in card["model"]:
        return CheckResult("golden values", None, "no public values are recorded for this judge")
    if reference_image is None:
        needed = "OpenAI's ViT-B/32 on CLIP.png of github.com/openai/CLIP. Pass --reference-image CLIP.png."
        return CheckResult("golden values", None, needed)
    from dpo_mm.data.image_files import decode_image
    from dpo_mm.judges.weights import sha256

    if sha256(Path(reference_image)) != CLIP_PNG_SHA256:
        wrong = f"{reference_image} is not the CLIP.png with known values (sha256 {CLIP_PNG_SHA256[:8]}...)"
        return CheckResult("golden values", False, wrong)
    image = decode_image(Path(reference_image).read_bytes())
    return compare_clip_probabilities(judge([image] * 3, list(CLIP_LABELS)))


def compare_clip_probabilities(scores: Sequence[float]) -> CheckResult:
    """Compare CLIPScores of the three labels with the probabilities that OpenAI prints: softmax of 100 cos."""
    logits = 100 * np.array(scores) / 2.5
    p = np.exp(logits - logits.max())
    p /= p.sum()
    passed = bool(np.abs(p - np.array(CLIP_PROBABILITIES)).max() < 2e-3)
    return CheckResult(
        "golden values", passed, f"probabilities {p.round(5).tolist()}, OpenAI's README prints {CLIP_PROBABILITIES}"
    )


def check_laion_head(name: str, card: dict[str, Any]) -> CheckResult:
    """Compare LAION's head with its golden values at three embeddings."""
    import torch

    from dpo_mm.judges.clip import LAION_HEAD, head, read_head
    from dpo_mm.judges.weights import find_weights

    parsed = parse_judge_name(name)
    assert parsed is not None
    path = find_weights(LAION_HEAD, parsed)
    if not card["weights"][path.name]["published"]:
        return CheckResult("golden values", None, "recorded for the published head only, and this is another file")
    inputs = torch.stack([torch.zeros(768), torch.ones(768), torch.eye(768)[0]])
    values = head(inputs, read_head(path)).tolist()
    passed = bool(np.allclose(values, list(HEAD_VALUES.values()), atol=1e-4))
    return CheckResult(
        "golden values", passed, f"head {[round(v, 5) for v in values]}, recorded {list(HEAD_VALUES.values())}"
    )


def check_pairwise(name: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> Iterator[CheckResult]:
    """Check a pairwise judge: swapped pairs give the opposite result, and own captions win more often."""
    judge, others = load_pairwise(name), [*images[1:], images[0]]
    forward, swapped = np.array(judge(images, others, prompts)), np.array(judge(others, images, prompts))
    yield CheckResult(
        "swapped pairs", bool(np.allclose(forward + swapped, 1)), f"{forward.tolist()}, swapped {swapped.tolist()}"
    )
    wins, ties = int((forward > 0.5).sum()), int((forward == 0.5).sum())
    observed = f"the image with that caption wins {wins} of {len(forward)}, {ties} ties (orders disagree, or unparsed)"
    yield CheckResult("captions", bool(forward.mean() > 0.5), observed)
    yield CheckResult("golden values", None, "no public values are recorded for this judge")
