"""The exact judge of the synthetic shapes: it detects the objects in an image from its pixels.

Coloured shapes are on a neutral background, so colour separates them. A pixel belongs to an object if its chroma is
high, and connected pixels are one object. The hue gives the colour. The shape is the one whose outline, rendered in the
same bounding box, overlaps best. An image is right if it contains exactly the objects of the prompt and no others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from dpo_mm.data.image_files import to_rgb
from dpo_mm.worlds import shapes

CHROMA = 52
"""Chroma above which a pixel belongs to an object, of 255: half of the dullest colour's, so blur does not move an outline."""
MIN_AREA = 24
"""Pixels. Anything larger must be a recognised object."""
MIN_OVERLAP = 0.62
"""Smallest intersection over union with the outline of a shape."""


@dataclass(frozen=True)
class DetectedObject:
    """A detected object.

    Attributes:
        shape, colour: None if it is unclear.
        x, y: centre of the bounding box, in pixels.
        width, height: edges of the bounding box, in pixels.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    width: int
    height: int


def detect_objects(image: Image.Image) -> list[DetectedObject]:
    """Detect the objects in a 64x64 image, largest first.

    Raises:
        ValueError: if the image has another size.
    """
    if image.size != (shapes.SIZE, shapes.SIZE):
        raise ValueError(
            f"image is {image.size[0]}x{image.size[1]}, but the judge of shapes only scores {shapes.SIZE}x{shapes.SIZE}"
        )
    pixels = np.asarray(to_rgb(image), dtype=np.float32)
    chroma = pixels.max(-1) - pixels.min(-1)
    labels, _ = ndimage.label(chroma > CHROMA)
    background = np.median(pixels[labels == 0], axis=0) if (labels == 0).any() else np.zeros(3, np.float32)
    detected = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        area = int((labels[box] == number).sum())
        if area >= MIN_AREA:
            detected.append((area, _recognise(labels, number, box, pixels, chroma, background)))
    return [detected_object for _, detected_object in sorted(detected, key=lambda pair: -pair[0])]


def _recognise(
    labels: np.ndarray,
    number: int,
    box: tuple[slice, slice],
    pixels: np.ndarray,
    chroma: np.ndarray,
    background: np.ndarray,
) -> DetectedObject:
    rows, columns = (slice(max(edge.start - 3, 0), edge.stop + 3) for edge in box)
    inside = labels[rows, columns] == number
    near = ndimage.binary_dilation(inside, iterations=3) & ((labels[rows, columns] == 0) | inside)
    coverage = _coverage(pixels[rows, columns], chroma[rows, columns], inside, near, background)
    covered_rows = np.flatnonzero((coverage > 0.5).any(1))
    covered_columns = np.flatnonzero((coverage > 0.5).any(0))
    crop = coverage[covered_rows[0] : covered_rows[-1] + 1, covered_columns[0] : covered_columns[-1] + 1]
    return DetectedObject(
        shape=_shape(crop),
        colour=_colour(pixels[rows, columns][inside], chroma[rows, columns][inside]),
        x=columns.start + (covered_columns[0] + covered_columns[-1] + 1) / 2,
        y=rows.start + (covered_rows[0] + covered_rows[-1] + 1) / 2,
        width=len(crop[0]),
        height=len(crop),
    )


def _coverage(
    pixels: np.ndarray, chroma: np.ndarray, inside: np.ndarray, near: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Fraction of each pixel that the object covers, in [0, 1]: its position between background and paint colour.

    Chroma finds an object but blurs its edge (JPEG stores colour at half resolution). Brightness has the sharp edge.
    """
    paint = np.median(pixels[inside & (chroma >= np.quantile(chroma[inside], 0.6))], axis=0)
    outside = near & ~ndimage.binary_dilation(inside, iterations=2)
    if outside.sum() >= 8:
        background = np.median(pixels[outside], axis=0)
    line = paint - background
    return np.where(near, ((pixels - background) @ line / (line @ line)).clip(0, 1), 0)


def _colour(pixels: np.ndarray, chroma: np.ndarray) -> str | None:
    """Colour with most of an object's chroma, or None if it has less than 70 %."""
    distance = np.abs(_hue(pixels)[:, None] - _hues()[None, :])
    nearest = np.minimum(distance, 360 - distance).argmin(1)
    weight = np.bincount(nearest, weights=chroma, minlength=len(shapes.COLOURS))
    best = int(weight.argmax())
    return list(shapes.COLOURS)[best] if weight[best] >= 0.7 * weight.sum() else None


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Hue in degrees on the colour hexagon, (n,) from (n, 3)."""
    r, g, b = rgb.T
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360


@functools.cache
def _hues() -> np.ndarray:
    return _hue(np.array(list(shapes.COLOURS.values()), dtype=np.float32))


def _shape(coverage: np.ndarray) -> str | None:
    height, width = coverage.shape
    if not 0.72 <= width / height <= 1.39 or min(height, width) < 9:
        return None
    overlaps = {}
    for shape in shapes.SHAPES:
        outline = _outline(shape, width, height)
        overlaps[shape] = np.minimum(coverage, outline).sum() / np.maximum(coverage, outline).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


@functools.cache
def _outline(shape: str, width: int, height: int) -> np.ndarray:
    """Fraction of each pixel that a shape covers if it fills this box, (height, width) in [0, 1]."""
    oversample = 8
    mask = Image.new("L", (width * oversample, height * oversample))
    points = shapes.outline(shape, 0.5, 0.5, 1.0)
    polygon = [(x * width * oversample, y * height * oversample) for x, y in points]
    ImageDraw.Draw(mask).polygon(polygon, fill=255)
    return np.asarray(mask.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def satisfies(image: Image.Image, spec: shapes.SceneSpec) -> bool:
    """Check if an image contains exactly the objects of a prompt, all of them and no others."""
    detected = detect_objects(image)
    if len(detected) != sum(wanted.count for wanted in spec.objects):
        return False
    unmatched = list(detected)
    matches = []
    for wanted in sorted(spec.objects, key=lambda wanted: (wanted.colour is None, wanted.size is None)):
        for _ in range(wanted.count):
            match = next((candidate for candidate in unmatched if _matches(candidate, wanted)), None)
            if match is None:
                return False
            unmatched.remove(match)
            matches.append((spec.objects.index(wanted), match))
    if spec.relation is None:
        return True
    first, second = (match for _, match in sorted(matches, key=lambda pair: pair[0]))
    return shapes.holds(spec.relation, first, second)


def _matches(detected: DetectedObject, wanted: shapes.ObjectSpec) -> bool:
    if detected.shape != wanted.shape or detected.colour is None or wanted.colour not in (None, detected.colour):
        return False
    edge = max(detected.width, detected.height)
    return wanted.size is None or (edge >= 24 if wanted.size == "big" else edge <= 21)


def faithfulness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Scores of the images: 1.0 if an image shows exactly what its prompt describes, else 0.0."""
    return [float(satisfies(image, shapes.parse(prompt))) for image, prompt in zip(images, prompts, strict=True)]
