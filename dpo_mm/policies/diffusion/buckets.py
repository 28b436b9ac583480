"""How a picture becomes one of the training size: buckets by aspect ratio, and the scale and crop, which nothing random decides.

A bucket is a (width, height) of about the area of the model's own square, in steps of 64 pixels (less for small models).
Source: Podell et al. 2023 (2307.01952), appendix I; the list's shape is NovelAI's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]
"""Width and height in pixels."""
STEP, WIDEST = 64, 4
"""Pixels between the sides of neighbouring buckets where the model is large enough; the widest aspect ratio."""


class Crop(NamedTuple):
    """What a picture is scaled to, (width, height), and the box kept of it, (left, top, right, bottom)."""

    scaled: Size
    box: tuple[int, int, int, int]


def cover(size: Size, frame: Size) -> Crop:
    """A picture of this size scaled until it covers the frame, its centre kept."""
    scale = max(frame[0] / size[0], frame[1] / size[1])
    width, height = round(size[0] * scale), round(size[1] * scale)
    left, top = (width - frame[0]) // 2, (height - frame[1]) // 2
    return Crop((width, height), (left, top, left + frame[0], top + frame[1]))


def buckets_of(resolution: int, unit: int) -> list[Size]:
    """Frames of at most resolution^2 pixels, from the tallest to the widest; sides are multiples of the step.

    unit: pixels that a side must be a multiple of (the autoencoder's factor times the denoiser's patch).
    """
    step = max(1, min(STEP, resolution // 8) // unit) * unit
    narrowest = -(-resolution // 2 // step) * step
    tall = [(width, resolution**2 // width // step * step) for width in range(narrowest, resolution + 1, step)]
    tall = [(width, height) for width, height in tall if height <= WIDEST * width]
    return sorted({*tall, *((height, width) for width, height in tall)}, key=lambda size: size[0] / size[1])


def bucket_for(sizes: Sequence[Size], buckets: Sequence[Size]) -> Size:
    """The bucket that pictures of one pair share: nearest to the geometric mean of their aspect ratios."""
    aspect = sum(math.log(width / height) for width, height in sizes) / len(sizes)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
