"""Exact judges of edits of the synthetic shapes, in two readings: the instruction is followed, and the rest is preserved.

`edit_followed` looks only at the object that the instruction names. A recoloured object has its shape, its place and the new colour.
A removed object leaves the background, and no other object of its name appears. An added object has its shape and colour, in any free
place. `edit_preserved` looks only at the rest: every other object has its shape, colour, place and size, nothing else is added, and
pixels outside of the named object's box differ little.
An unchanged image is preserved and not followed. An image in which everything turned red is followed and not preserved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.data.image_files import to_rgb
from dpo_mm.judges.scene import DetectedObject, detect_objects
from dpo_mm.worlds.shape_edits import ShapeEdit, parse

MAX_SHIFT = 3.0
"""Pixels. An object whose centre or edge moved further is another object."""
MARGIN = 3
"""Pixels around the named object's box that may change with it."""
MAX_DIFFERENCE = 8.0
"""Largest mean difference of pixels that should be equal, of 255: above the noise of a decoder, below the faintest object's in its box."""
CHANGED, MAX_CHANGED = 48.0, 0.01
"""Difference from which a pixel counts as changed, of 255, and the largest fraction of changed pixels outside of the box."""


class _Reading(NamedTuple):
    """The image to edit and the edited one: pixels, the named object, the others, and what the edited image shows.

    The named object is that of the image to edit. One to add is that of the edited image, None if nothing is added.
    """

    before: np.ndarray
    after: np.ndarray
    named: DetectedObject | None
    others: list[DetectedObject]
    shown: list[DetectedObject]


def edit_followed(
    images: Sequence[Image.Image], prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]]
) -> list[float]:
    """Scores of the images: 1.0 if the named object is as the instruction wants it, else 0.0."""
    return [float(_is_followed(*one)) for one in zip(images, prompts, sources, strict=True)]


def edit_preserved(
    images: Sequence[Image.Image], prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]]
) -> list[float]:
    """Scores of the images: 1.0 if everything but the named object is unchanged, else 0.0."""
    return [float(_is_preserved(*one)) for one in zip(images, prompts, sources, strict=True)]


def _is_followed(image: Image.Image, prompt: str, sources: Sequence[Image.Image]) -> bool:
    edit = parse(prompt)
    reading = _read(image, prompt, edit, sources)
    named = reading.named
    if named is None:
        return False
    if edit.is_added:
        return edit.names(named.shape, named.colour)
    if edit.new_colour:
        return any(_is_same(one, named, edit.new_colour) for one in reading.shown)
    if any(edit.names(one.shape, one.colour) for one in reading.shown):
        return False
    box = _box(named, reading.before.shape)
    return float(np.abs(reading.after - _background(reading.before, reading))[box].mean()) <= MAX_DIFFERENCE


def _is_preserved(image: Image.Image, prompt: str, sources: Sequence[Image.Image]) -> bool:
    reading = _read(image, prompt, parse(prompt), sources)
    remaining, named = list(reading.shown), reading.named
    for other in reading.others:
        match = next((one for one in remaining if _is_same(one, other, other.colour)), None)
        if match is None:
            return False
        remaining.remove(match)
    if named and any(_distance(one, named) > max(named.width, named.height) / 2 for one in remaining):
        return False
    difference = np.abs(reading.after - reading.before).max(-1)
    outside = np.ones(difference.shape, bool)
    if named:
        outside[_box(named, reading.before.shape)] = False
    rest = difference[outside]
    return float(rest.mean()) <= MAX_DIFFERENCE and float((rest > CHANGED).mean()) <= MAX_CHANGED


def _read(image: Image.Image, prompt: str, edit: ShapeEdit, sources: Sequence[Image.Image]) -> _Reading:
    """Detect the objects before and after the edit.

    Raises:
        ValueError: unless there is one image to edit, and the instruction adds an object or names exactly one of the image's.
    """
    if len(sources) != 1:
        raise ValueError(f"prompt {prompt!r} has {len(sources)} images to edit. Edits of shapes have one")
    objects, shown = detect_objects(sources[0]), detect_objects(image)
    before, after = (np.asarray(to_rgb(each), dtype=np.float32) for each in (sources[0], image))
    if edit.is_added:
        added = [one for one in shown if not any(_is_same(one, other, other.colour) for other in objects)]
        wanted = next((one for one in added if edit.names(one.shape, one.colour)), next(iter(added), None))
        return _Reading(before, after, wanted, objects, shown)
    named = [one for one in objects if edit.names(one.shape, one.colour)]
    if len(named) != 1:
        raise ValueError(f"prompt {prompt!r} names {len(named)} objects of its image. Name one")
    return _Reading(before, after, named[0], [one for one in objects if one is not named[0]], shown)


def _is_same(one: DetectedObject, other: DetectedObject, colour: str | None) -> bool:
    """Check if an object has the shape, the place and the size of another, and a colour."""
    sizes = abs(one.width - other.width), abs(one.height - other.height)
    moved = _distance(one, other) > MAX_SHIFT or max(sizes) > MAX_SHIFT
    return one.shape == other.shape and one.colour == colour and not moved


def _distance(one: DetectedObject, other: DetectedObject) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)


def _box(one: DetectedObject, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of an object, with MARGIN pixels around them."""
    half = one.height / 2 + MARGIN, one.width / 2 + MARGIN
    rows, columns = (
        slice(max(0, math.floor(centre - edge)), min(size, math.ceil(centre + edge)))
        for centre, edge, size in zip((one.y, one.x), half, shape[:2], strict=True)
    )
    return rows, columns


def _background(pixels: np.ndarray, reading: _Reading) -> np.ndarray:
    """Estimate the background without objects, (height, width, 3): the median of each row outside of the objects' boxes.

    A row without such pixels has the colour of the nearest row that has some.
    """
    free = np.ones(pixels.shape[:2], bool)
    for one in filter(None, (reading.named, *reading.others)):
        free[_box(one, pixels.shape)] = False
    rows = np.flatnonzero(free.any(1))
    if not len(rows):
        return np.broadcast_to(np.median(pixels, axis=(0, 1)), pixels.shape)
    medians = np.array([np.median(pixels[row][free[row]], axis=0) for row in rows])
    nearest = np.abs(np.arange(len(pixels))[:, None] - rows[None, :]).argmin(1)
    return np.broadcast_to(medians[nearest][:, None, :], pixels.shape)
