"""Whether a judge on this machine is the one it is named after, as far as that can be checked without a data set.

Its files against the sha256 that their authors published; the same scores twice, and in batches as one by one; pictures
of the world of shapes score higher with their own captions than with others'; and golden values, where any are public:

- clip_score with OpenAI's ViT-B/32: the label probabilities of CLIP.png printed in the README of github.com/openai/CLIP
  (the picture, sha256 308a3ca4..., is to be had there). They come from half precision, hence the tolerance.
- laion_aesthetic: its head at three embeddings, computed by the project from the published file with numpy, float64.

For PickScore, HPS, VQAScore and Soft-TIFA no example score with a picture to go with it was found: none is recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.judges import JUDGES, is_pairwise, judge_card, load_judge, load_pairwise, parse_judge_name
from dpo_mm.worlds import shapes

CAPTIONS = ("a red circle", "a blue square", "a green triangle", "a yellow star")
CLIP_PNG = "308a3ca4503f1c7a07803916c369d78c4ef501e5ab7fc727da9b5e1d2f9ec85b"
CLIP_LABELS = ("a diagram", "a dog", "a cat")
CLIP_PROBABILITIES = (0.9927937, 0.00421068, 0.00299572)
HEAD_VALUES = {"nothing": 5.23664585, "all alike": 4.88328485, "the first alone": 4.54505240}
"""LAION's head at an embedding of zeros, of ones, and of a one and zeros."""


class CheckResult(NamedTuple):
    """One check: whether it passed (None: it says nothing here), and what was seen."""

    name: str
    passed: bool | None
    observed: str


BLIND = CheckResult("captions", None, "this judge doesn't read prompts, or has questions about its own alone")


def self_test(name: str, picture: str | None = None) -> Iterator[CheckResult]:
    """Checks of a judge, one after another. picture: CLIP.png, for the golden values that need it.

    Raises ValueError as `load_judge`.
    """
    card, found = judge_card(name), parse_judge_name(name)
    yield from weights(card)
    images, prompts = pictures(found.where if found and "questions" in card else None)
    if is_pairwise(name):
        yield from pairwise(name, images, prompts)
        return
    judge = load_judge(name)
    together = np.array(judge(images, prompts), dtype=float)
    yield CheckResult(
        "repeats itself", bool((together == np.array(judge(images, prompts))).all()), "the same pictures twice"
    )
    apart = np.array([judge([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)])
    gap = float(np.abs(apart - together).max())
    yield CheckResult(
        "batches don't matter", gap <= tolerance(card, together), f"one by one and together: {gap:.2g} apart at most"
    )
    reads = bool(not found or JUDGES[found.judge].reads) and "questions" not in card
    yield order(judge, images, prompts, least=tolerance(card, together)) if reads else BLIND
    yield golden(name, judge, card, picture)


def weights(card: dict[str, Any]) -> Iterator[CheckResult]:
    """Files against their published sha256."""
    for file, about in card.get("weights", {}).items():
        known = about["published"]
        words = {True: "as published", False: "NOT as published", None: "no published sha256 is recorded"}
        yield CheckResult(f"weights {file}", known, f"sha256 {about['sha256']}, {words[known]}")


def pictures(questions: str | None) -> tuple[list[Image.Image], list[str]]:
    """Pictures of shapes with their captions, or with the first prompts of a file of questions."""
    drawn = [shapes.sample_scene(shapes.parse(text), np.random.default_rng(n)) for n, text in enumerate(CAPTIONS)]
    images = [shapes.render(scene) for scene in drawn]
    if questions is None:
        return images, list(CAPTIONS)
    from dpo_mm.judges.soft_tifa import read_questions

    known = itertools.cycle(read_questions(Path(questions).expanduser()))
    return images, [next(known) for _ in images]


def tolerance(card: dict[str, Any], scores: np.ndarray) -> float:
    """What rounding may do to a score: half precision on a GPU for a model in its own precision, else float32."""
    import torch

    size = max(1.0, float(np.abs(scores).max()))
    return size * (2e-2 if "template" in card and torch.cuda.is_available() else 1e-4)


def order(judge: Any, images: Sequence[Image.Image], prompts: Sequence[str], *, least: float) -> CheckResult:
    """Pictures score higher with their own captions than with others', in the mean, by more than `least`."""
    rows = [(image, prompt) for image in images for prompt in prompts]
    scores = np.array(judge([image for image, _ in rows], [prompt for _, prompt in rows])).reshape(len(images), -1)
    own = float(np.diag(scores).mean())
    other = float((scores.sum() - np.diag(scores).sum()) / (scores.size - len(images)))
    seen = f"own {own:.4f}, others' {other:.4f} in the mean of {len(images)} pictures"
    return CheckResult("captions", own - other > least, seen)


def golden(name: str, judge: Any, card: dict[str, Any], picture: str | None) -> CheckResult:
    """Golden values where they are public; what there is, and what it takes, where they aren't checked."""
    found = parse_judge_name(name)
    if found and found.judge == "laion_aesthetic":
        return laion_golden(name, card)
    if not found or found.judge != "clip_score" or "ViT-B-32" not in card["model"]:
        return CheckResult("golden values", None, "no public ones are recorded for this judge")
    if picture is None:
        return CheckResult(
            "golden values", None, "of OpenAI's ViT-B/32 for CLIP.png of github.com/openai/CLIP: --picture CLIP.png"
        )
    from dpo_mm.data.image_files import decode_image
    from dpo_mm.judges.weights import sha256

    if sha256(Path(picture)) != CLIP_PNG:
        return CheckResult(
            "golden values", False, f"{picture} is not the CLIP.png whose values are known (sha256 {CLIP_PNG[:8]}...)"
        )
    image = decode_image(Path(picture).read_bytes())
    return clip_golden(judge([image] * 3, list(CLIP_LABELS)))


def clip_golden(scores: Sequence[float]) -> CheckResult:
    """CLIPScores of the three labels as the probabilities that OpenAI prints: softmax of 100 cos."""
    logits = 100 * np.array(scores) / 2.5
    p = np.exp(logits - logits.max())
    p /= p.sum()
    near = bool(np.abs(p - np.array(CLIP_PROBABILITIES)).max() < 2e-3)
    return CheckResult(
        "golden values", near, f"probabilities {p.round(5).tolist()}, OpenAI's README prints {CLIP_PROBABILITIES}"
    )


def laion_golden(name: str, card: dict[str, Any]) -> CheckResult:
    """LAION's head at three embeddings."""
    import torch

    from dpo_mm.judges.clip import LAION_HEAD, head, read_head
    from dpo_mm.judges.weights import find

    found = parse_judge_name(name)
    assert found is not None
    path = find(LAION_HEAD, found)
    if not card["weights"][path.name]["published"]:
        return CheckResult("golden values", None, "those of the published head; this is another file")
    inputs = torch.stack([torch.zeros(768), torch.ones(768), torch.eye(768)[0]])
    values = head(inputs, read_head(path)).tolist()
    near = bool(np.allclose(values, list(HEAD_VALUES.values()), atol=1e-4))
    return CheckResult(
        "golden values", near, f"head {[round(v, 5) for v in values]}, recorded {list(HEAD_VALUES.values())}"
    )


def pairwise(name: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> Iterator[CheckResult]:
    """A judge of pairs: the other way round it says the opposite; how often it decides at all."""
    judge, other = load_pairwise(name), [*images[1:], images[0]]
    one, back = np.array(judge(images, other, prompts)), np.array(judge(other, images, prompts))
    yield CheckResult("swapped pairs", bool(np.allclose(one + back, 1)), f"{one.tolist()}, swapped {back.tolist()}")
    yield CheckResult("captions", bool(one.mean() > 0.5), f"{int((one > 0.5).sum())} of {len(one)} for the picture with that caption, "
                f"{int((one == 0.5).sum())} ties (changed its mind with the order, or not understood)")  # fmt: skip
    yield CheckResult("golden values", None, "no public ones are recorded for this judge")
