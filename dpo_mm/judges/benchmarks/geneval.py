"""Judge of images by the rules of GenEval, on objects that a detector of yours found: `geneval@detections.jsonl`.

Each line describes one image: its file, GenEval's metadata of its prompt, and the objects by class, each with a box in pixels
(left, top, right, bottom), a confidence and, if the metadata names a colour, a colour:

    {"filename": "0000.png", "metadata": {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}],
     "prompt": "a photo of a red bench"}, "objects": {"bench": [{"box": [10, 20, 90, 80], "score": 0.97, "color": "red"}]}}

The results of GenEval's evaluate_images.py can be used too: `details` are its objects. They have no colours, so its own mark
(`correct`) counts for prompts with colours. Files are relative to the folder of the lines, and must be in it.

Source: Ghosh et al. 2023 (2310.11513), github.com/djghosh13/geneval (MIT), evaluation/evaluate_images.py.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from PIL import Image

from dpo_mm.data.image_files import decode_image, to_rgb
from dpo_mm.data.row_paths import MARK, read_file
from dpo_mm.data.text_files import read_lines
from dpo_mm.errors import one_line
from dpo_mm.judges import JudgeName, LazyJudge
from dpo_mm.judges.weights import sha256

LEAST_CONFIDENCE, LEAST_CONFIDENCE_COUNTING = 0.3, 0.9
"""Confidence above which an object counts, and that for prompts with a number."""
MOST_OBJECTS = 16
"""Objects of a class that count, those with the highest confidence."""
OVERLAP = 0.1
"""Part of the objects' sizes by which their centres must differ before one is left of or above the other."""


class Detection(NamedTuple):
    """An object in an image: left, top, right and bottom in pixels, confidence in [0, 1], and its colour or ""."""

    box: tuple[float, float, float, float]
    score: float
    color: str = ""


class DescribedImage(NamedTuple):
    """A line of the file: the image's file, GenEval's metadata, the objects by class, and the published mark if there is one."""

    file: str
    metadata: dict[str, Any]
    objects: dict[str, list[Detection]]
    mark: bool | None


def geneval(name: JudgeName) -> LazyJudge:
    """GenEval's rate of correct images."""
    if name.model or not name.location:
        raise ValueError("judge 'geneval' needs the detected objects. Write geneval@detections.jsonl")
    path = Path(name.location).expanduser()
    lines = read_detections(path)

    @functools.cache
    def marks() -> dict[tuple[str, str], bool]:
        return {(line.metadata["prompt"], _pixels(_open(line.file, path))): _mark(line, path) for line in lines}

    def judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            mark = marks().get((prompt, _pixels(image)))
            if mark is None:
                raise ValueError(
                    f"{path}: no line describes this image of the prompt {prompt!r:.80}. Detect its objects first"
                )
            scores.append(float(mark))
        return scores

    return LazyJudge(judge, lambda: {"model": "detected objects", "detections": sha256(path)})


def read_detections(path: Path) -> list[DescribedImage]:
    """Read the detected objects of images.

    Raises:
        ValueError: if the file is missing or empty, or a line is not as described. It names the line.
    """
    if not path.is_file():
        raise ValueError(
            f"detections {str(path)!r}: no such file. Expected JSON lines with filename, metadata and objects"
        )
    lines = []
    for number, text in enumerate(read_lines(path), start=1):
        if text.strip():
            try:
                lines.append(_described_image(json.loads(text)))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(
                    f"{path}, line {number}: {one_line(error)}. Expected filename, GenEval's metadata and objects by class"
                ) from None
    if not lines:
        raise ValueError(f"{path}: no lines. Expected one object per image")
    return lines


def _described_image(row: dict[str, Any]) -> DescribedImage:
    metadata = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
    objects = row["objects"] if "objects" in row else row["details"]
    objects = json.loads(objects) if isinstance(objects, str) else objects
    for number, wanted in enumerate(metadata["include"]):
        int(wanted["count"]), str(wanted["class"])
        if "position" in wanted and not 0 <= wanted["position"][1] < number:
            raise ValueError(
                f"object {number} of include is placed next to object {wanted['position'][1]}, which is not before it"
            )
    if not isinstance(metadata["prompt"], str) or not isinstance(metadata["tag"], str):
        raise ValueError("prompt or tag is not a text")
    detections = {name: [_detection(each) for each in several] for name, several in objects.items()}
    return DescribedImage(str(row["filename"]), metadata, detections, row.get("correct"))


def _detection(value: Any) -> Detection:
    box, score, color = (
        (value["box"], value["score"], value.get("color", "")) if isinstance(value, dict) else (value[:4], value[4], "")
    )
    left, top, right, bottom = map(float, box)
    return Detection((left, top, right, bottom), float(score), str(color))


def _mark(line: DescribedImage, path: Path) -> bool:
    objects = counted_objects(line)
    named = [each for each in line.metadata["include"] if "color" in each]
    if any(not one.color for each in named for one in objects.get(each["class"], [])[: each["count"]]):
        if not isinstance(line.mark, bool):
            raise ValueError(
                f"{path}: {line.file} has objects without a color, and its prompt names one. Add their colors"
            )
        return line.mark
    return is_correct(objects, line.metadata)


def counted_objects(line: DescribedImage) -> dict[str, list[Detection]]:
    """Return the objects that count, by class: the most confident ones first."""
    least = LEAST_CONFIDENCE_COUNTING if line.metadata["tag"] == "counting" else LEAST_CONFIDENCE
    return {
        name: sorted((each for each in several if each.score > least), key=lambda each: -each.score)[:MOST_OBJECTS]
        for name, several in line.objects.items()
    }


def is_correct(objects: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any]) -> bool:
    """Check if an image has all objects of a prompt, in number, colour and position, and none too many.

    Args:
        objects: objects that count, by class, the most confident ones first.
        metadata: GenEval's metadata of the prompt: `include` and, optionally, `exclude`.
    """
    right: list[Sequence[Detection] | None] = []
    for wanted in metadata["include"]:
        several = objects.get(wanted["class"], [])[: wanted["count"]]
        fits = len(several) == wanted["count"]
        fits &= all(each.color == wanted.get("color", each.color) for each in several)
        if "position" in wanted:
            relation, other = wanted["position"]
            targets = right[other]
            fits &= targets is not None and all(relation in relations(a, b) for a in several for b in targets)
        right.append(several if fits else None)
    too_many = any(len(objects.get(each["class"], ())) >= each["count"] for each in metadata.get("exclude", ()))
    return None not in right and not too_many


def relations(a: Detection, b: Detection) -> set[str]:
    """Return how an object lies to another: "left of", "right of", "above", "below", two of them, or none."""
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        sizes = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - OVERLAP * sizes, 0), offset))
    if all(abs(each) < 1e-3 for each in beyond):
        return set()
    right, down = (each / math.hypot(*offsets) for each in beyond)
    directions = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, part in directions.items() if part > 0.5}


def _open(file: str, path: Path) -> Image.Image:
    try:
        return decode_image(read_file(f"{path.parent}{MARK}{file}"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: image {file} cannot be read ({one_line(error)})") from None


def _pixels(image: Image.Image) -> str:
    rgb = to_rgb(image)
    return f"{rgb.size}-{xxhash.xxh3_128_hexdigest(rgb.tobytes())}"
