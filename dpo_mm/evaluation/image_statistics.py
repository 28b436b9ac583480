"""Image statistics that need no model: diversity, saturation, sharpness and file size.

A judge that prefers colour or sharpness trains colour or sharpness. These statistics depend on no model and no judge,
so the report can show such a change next to the gain.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from dpo_mm.data.image_files import to_rgb
from dpo_mm.evaluation.image_store import COMPRESS_LEVEL, ImageFiles

MAX_SIDE = 64
"""Longest edge of the small copies, pixels, at most. They have a quarter of the image's size if that is less."""
IMAGE_STATISTICS = "looks"
"""Judge's name in comparisons of these statistics."""
THREADS = 8
"""Threads, at most. Each decodes an image at a time."""
METRICS = {"saturation": "saturation", "sharpness": "sharpness", "bytes": "file size, bytes"}
"""A statistic's field in `ImageStatistics`, and its name in a report."""


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of images, (images,) each.

    Args:
        small: small copies, (images, h, w, 3) uint8.
        saturation: mean of (max - min) / max over pixels, in [0, 1].
        sharpness: standard deviation of the Laplacian of brightness, with brightness in [0, 1].
        bytes: size as PNG. Detail and noise increase it.
    """

    small: np.ndarray
    saturation: np.ndarray
    sharpness: np.ndarray
    bytes: np.ndarray


def image_statistics(images: Sequence[Image.Image]) -> ImageStatistics:
    """Compute the statistics of each image. Each of at most THREADS threads has one image in memory."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        values = list(pool.map(lambda number: _statistics_of(images, number), range(len(images))))
    small, saturation, sharpness, size = zip(*values, strict=True)
    return ImageStatistics(np.stack(small), np.array(saturation), np.array(sharpness), np.array(size, dtype=np.float64))


def _statistics_of(images: Sequence[Image.Image], number: int) -> tuple[np.ndarray, float, float, int]:
    """Return an image's small copy, saturation, sharpness and size in bytes."""
    image = to_rgb(images[number])
    scale = min(1.0, MAX_SIDE / (max(image.size) / 4)) / 4
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = np.asarray(image, dtype=np.float32) / 255
    red, green, blue = (pixels[..., channel] for channel in range(3))  # a reduction over an axis of 3 is much slower
    top, bottom = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    saturation = np.where(top > 0, (top - bottom) / np.where(top > 0, top, 1), 0).mean()
    sharpness = ndimage.laplace((red + green + blue) / 3).std()
    small = np.asarray(image.resize(size, Image.Resampling.BOX))
    return small, float(saturation), float(sharpness), _png_bytes(images, number, image)


def _png_bytes(images: Sequence[Image.Image], number: int, image: Image.Image) -> int:
    """Return the size of an image as PNG: of its file if it was generated into one, which is much faster."""
    if isinstance(images, ImageFiles):
        return images.files[number].stat().st_size
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=COMPRESS_LEVEL)
    return file.tell()


def pairwise_distance(small: np.ndarray, samples: int) -> np.ndarray:
    """Compute the mean pairwise RMS pixel distance of each prompt's images.

    Args:
        small: small copies, (prompts x samples, h, w, 3) uint8, a prompt's images together.
        samples: images per prompt, >= 2.

    Returns:
        Distance per prompt in [0, 1], (prompts,).
    """
    pairs = list(itertools.combinations(range(samples), 2))
    groups = (group.astype(np.float32) / 255 for group in small.reshape(-1, samples, small[0].size))
    return np.array([np.mean([np.sqrt(np.mean((g[a] - g[b]) ** 2)) for a, b in pairs]) for g in groups])
