"""Resizing images to a training size: aspect-ratio buckets, scale and centre crop, all deterministic.

A bucket is a (width, height) with about the area of the model's own square, in steps of 64 pixels (less for small
models). Source: Podell et al. 2023 (2307.01952), appendix I. The shape of the list is NovelAI's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""
STEP = 64
"""Difference between the edges of neighbouring buckets in pixels, if the model is large enough."""
MAX_ASPECT_RATIO = 4


class Crop(NamedTuple):
    """Scaling of an image and the crop of the scaled image."""

    scaled: Size
    """Width and height of the scaled image, in pixels."""
    box: tuple[int, int, int, int]
    """Left, top, right and bottom of the crop in the scaled image, in pixels."""


def cover(size: Size, target: Size) -> Crop:
    """Scale an image until it covers the target size, and crop it to its centre.

    Args:
        size: width and height of the image, in pixels.
        target: width and height after the crop, in pixels.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = round(size[0] * scale), round(size[1] * scale)
    left, top = (width - target[0]) // 2, (height - target[1]) // 2
    return Crop((width, height), (left, top, left + target[0], top + target[1]))


def scale_and_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """Return the crop of an image, scaled first if its size differs."""
    scaled = image if crop.scaled == image.size else image.resize(crop.scaled, Image.Resampling.LANCZOS)
    return scaled.crop(crop.box)


def buckets_of(resolution: int, unit: int) -> list[Size]:
    """List the buckets of a resolution, from the tallest to the widest.

    Args:
        resolution: pixels per edge of the model's own square.
        unit: pixels that an edge must be a multiple of, the autoencoder's factor times the denoiser's patch.

    Returns:
        Sizes of at most resolution^2 pixels. Their edges are multiples of the step, and their aspect ratios at most 4.
    """
    step = max(1, min(STEP, resolution // 8) // unit) * unit
    narrowest = -(-resolution // 2 // step) * step
    tall = [(width, resolution**2 // width // step * step) for width in range(narrowest, resolution + 1, step)]
    tall = [(width, height) for width, height in tall if height <= MAX_ASPECT_RATIO * width]
    return sorted({*tall, *((height, width) for width, height in tall)}, key=lambda size: size[0] / size[1])


def bucket_for(sizes: Sequence[Size], buckets: Sequence[Size]) -> Size:
    """Choose the bucket that the images of one pair share: the nearest to the geometric mean of their aspect ratios.

    Args:
        sizes: (width, height) of each image, in pixels.
        buckets: from `buckets_of`.
    """
    aspect = sum(math.log(width / height) for width, height in sizes) / len(sizes)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
