"""The exact judge of the world of shapes: what is in the picture, read from its pixels alone.

Coloured shapes stand on neutral ground, so colour itself separates them: a pixel belongs to an object when its chroma
is high, connected pixels are one object, their hue names its colour, and the shape is the one whose outline, drawn in
the same bounding box, overlaps best. A picture is right when it holds exactly what the prompt asks for, all of it and
nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from dpo_mm.worlds import shapes

CHROMA = 52  # of 255; half of the dullest colour's, so that an outline keeps its place under blur
SPECK = 24  # pixels; anything larger must be a recognised object
OVERLAP = 0.62  # least intersection over union with the outline of a shape


@dataclass(frozen=True)
class DetectedObject:
    """One object as seen: shape and colour None where neither is clear; box centre and sides in pixels."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    width: int
    height: int


def look(image: Image.Image) -> list[DetectedObject]:
    """The objects in a 64x64 picture, largest first. Raises ValueError for another size."""
    if image.size != (shapes.SIZE, shapes.SIZE):
        raise ValueError(
            f"image is {image.size[0]}x{image.size[1]}: the judge of shapes sees {shapes.SIZE}x{shapes.SIZE}"
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    chroma = pixels.max(-1) - pixels.min(-1)
    labels, _ = ndimage.label(chroma > CHROMA)
    ground = np.median(pixels[labels == 0], axis=0) if (labels == 0).any() else np.zeros(3, np.float32)
    seen = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        area = int((labels[box] == number).sum())
        if area >= SPECK:
            seen.append((area, _recognise(labels, number, box, pixels, chroma, ground)))
    return [one for _, one in sorted(seen, key=lambda pair: -pair[0])]


def _recognise(
    labels: np.ndarray,
    number: int,
    box: tuple[slice, slice],
    pixels: np.ndarray,
    chroma: np.ndarray,
    ground: np.ndarray,
) -> DetectedObject:
    rows, columns = (slice(max(side.start - 3, 0), side.stop + 3) for side in box)
    mine = labels[rows, columns] == number
    near = ndimage.binary_dilation(mine, iterations=3) & ((labels[rows, columns] == 0) | mine)
    cover = _coverage(pixels[rows, columns], chroma[rows, columns], mine, near, ground)
    lines, files = np.flatnonzero((cover > 0.5).any(1)), np.flatnonzero((cover > 0.5).any(0))
    inside = cover[lines[0] : lines[-1] + 1, files[0] : files[-1] + 1]
    return DetectedObject(
        shape=_shape(inside),
        colour=_colour(pixels[rows, columns][mine], chroma[rows, columns][mine]),
        x=columns.start + (files[0] + files[-1] + 1) / 2,
        y=rows.start + (lines[0] + lines[-1] + 1) / 2,
        width=len(inside[0]),
        height=len(inside),
    )


def _coverage(
    pixels: np.ndarray, chroma: np.ndarray, mine: np.ndarray, near: np.ndarray, ground: np.ndarray
) -> np.ndarray:
    """How much of each pixel the object covers, in [0, 1]: where its colour lies on the line from ground to paint.

    Chroma finds an object but blurs its edge (JPEG keeps colour at half size); brightness keeps the edge sharp.
    """
    paint = np.median(pixels[mine & (chroma >= np.quantile(chroma[mine], 0.6))], axis=0)
    outside = near & ~ndimage.binary_dilation(mine, iterations=2)
    if outside.sum() >= 8:
        ground = np.median(pixels[outside], axis=0)
    line = paint - ground
    return np.where(near, ((pixels - ground) @ line / (line @ line)).clip(0, 1), 0)


def _colour(pixels: np.ndarray, chroma: np.ndarray) -> str | None:
    """The colour that most of an object's chroma speaks for, or None where two share it."""
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


def _shape(inside: np.ndarray) -> str | None:
    height, width = inside.shape
    if not 0.72 <= width / height <= 1.39 or min(height, width) < 9:
        return None
    overlaps = {}
    for shape in shapes.SHAPES:
        outline = _outline(shape, width, height)
        overlaps[shape] = np.minimum(inside, outline).sum() / np.maximum(inside, outline).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= OVERLAP else None


@functools.cache
def _outline(shape: str, width: int, height: int) -> np.ndarray:
    """How much of each pixel a shape covers that fills this box, (height, width) in [0, 1]."""
    fine = 8
    mask = Image.new("L", (width * fine, height * fine))
    points = shapes.outline(shape, 0.5, 0.5, 1.0)
    ImageDraw.Draw(mask).polygon([(x * width * fine, y * height * fine) for x, y in points], fill=255)
    return np.asarray(mask.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def satisfies(image: Image.Image, request: shapes.SceneSpec) -> bool:
    """Whether the picture holds exactly what is asked for, all of it and nothing else."""
    seen = look(image)
    if len(seen) != sum(wanted.count for wanted in request.objects):
        return False
    left = list(seen)
    matched = []
    for wanted in sorted(request.objects, key=lambda one: (one.colour is None, one.size is None)):
        for _ in range(wanted.count):
            found = next((one for one in left if _is(one, wanted)), None)
            if found is None:
                return False
            left.remove(found)
            matched.append((request.objects.index(wanted), found))
    if request.relation is None:
        return True
    first, second = (one for _, one in sorted(matched, key=lambda pair: pair[0]))
    return shapes.holds(request.relation, first, second)


def _is(seen: DetectedObject, wanted: shapes.ObjectSpec) -> bool:
    if seen.shape != wanted.shape or seen.colour is None or wanted.colour not in (None, seen.colour):
        return False
    side = max(seen.width, seen.height)
    return wanted.size is None or (side >= 24 if wanted.size == "big" else side <= 21)


def faithfulness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1.0 where a picture shows exactly what its prompt asks for, else 0.0; one per picture."""
    return [float(satisfies(image, shapes.parse(prompt))) for image, prompt in zip(images, prompts, strict=True)]
