"""What pictures look like, whatever they show: how much they differ, how saturated, sharp and detailed they are.

A judge that is pleased by colour or sharpness teaches colour or sharpness. These measures ask no model and belong to no
judge, so what has drifted shows beside the gain.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

LARGEST = 64
"""Pixels a side of the small pictures that diversity compares, at most; a quarter of the size where that is less."""


@dataclass(frozen=True)
class ImageStatistics:
    """Measures of pictures, (pictures,) each, and small copies of them, (pictures, h, w, 3) uint8."""

    small: np.ndarray
    saturation: np.ndarray
    sharpness: np.ndarray
    bytes: np.ndarray


IMAGE_STATISTICS = "looks"
"""What stands for a judge's name beside these measures."""
MEASURES = {"saturation": "saturation", "sharpness": "sharpness", "bytes": "file size, bytes"}
"""A measure's name in Looks, and in a report's words."""


def image_statistics(images: Sequence[Image.Image]) -> ImageStatistics:
    """Each picture's looks; one picture is in memory at a time.

    saturation: mean of (max - min) / max over pixels, [0, 1]. sharpness: standard deviation of the Laplacian of
    brightness, brightness in [0, 1]. bytes: of the picture as PNG, which detail and noise make larger.
    """
    each = [_look(image.convert("RGB")) for image in images]
    small, saturation, sharpness, size = zip(*each, strict=True)
    return ImageStatistics(np.stack(small), np.array(saturation), np.array(sharpness), np.array(size, dtype=np.float64))


def _look(image: Image.Image) -> tuple[np.ndarray, float, float, int]:
    side = min(1.0, LARGEST / (max(image.size) / 4)) / 4
    size = (max(1, round(image.width * side)), max(1, round(image.height * side)))
    pixels = np.asarray(image, dtype=np.float32) / 255
    top = pixels.max(-1)
    saturation = np.where(top > 0, (top - pixels.min(-1)) / np.where(top > 0, top, 1), 0).mean()
    sharpness = ndimage.laplace(pixels.mean(-1)).std()
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    small = np.asarray(image.resize(size, Image.Resampling.BOX))
    return small, float(saturation), float(sharpness), file.tell()


def pairwise_distance(small: np.ndarray, samples: int) -> np.ndarray:
    """How much a prompt's pictures differ: mean pairwise RMS distance of pixels of small copies, (prompts,).

    small: (prompts x samples, h, w, 3) uint8, a prompt's pictures together.
    """
    pairs = list(itertools.combinations(range(samples), 2))
    groups = (group.astype(np.float32) / 255 for group in small.reshape(-1, samples, small[0].size))
    return np.array([np.mean([np.sqrt(np.mean((g[a] - g[b]) ** 2)) for a, b in pairs]) for g in groups])
