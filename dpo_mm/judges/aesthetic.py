"""An aesthetic judge that uses only pixels, for images of coloured objects on a neutral background.

The score is the geometric mean of four parts, each in [0, 1], so a high value of one part cannot make up for a low
value of another:

- vividness: saturation of the coloured objects, up to the saturation of pure paint. Dull paint looks dirty.
- background: a light and even background. A grey, mottled or noisy background looks like a bad print.
- composition: the coloured mass is balanced around the centre and keeps clear of the edges. Objects that touch the edge
  look cropped by mistake.
- sharpness: the outline falls from paint to background within about a pixel. Smears and ghosts have wide edges.

An image with no coloured objects, or with colour nearly everywhere, has no composition and scores 0, so a blank page, a
flat colour or noise cannot win. The content is not judged. `dpo_mm.judges.scene` does that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from dpo_mm.data.image_files import to_rgb

CHROMA = 52
"""Chroma above which a pixel counts as coloured, of 255. The judge of scenes uses the same threshold."""
COVER = (0.01, 0.03, 0.45, 0.65)
"""Coloured fraction of the canvas. The factor is 0 below the first value and 1 from the second to the third."""


def aesthetic(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Aesthetic scores in [0, 1], one per image. The prompts are ignored."""
    return [score(image) for image, _ in zip(images, prompts, strict=True)]


def score(image: Image.Image) -> float:
    """Score of one image: geometric mean of its parts, times a factor for the coloured fraction of the canvas."""
    pixels = np.asarray(to_rgb(image), dtype=np.float32)
    chroma = pixels.max(-1) - pixels.min(-1)
    objects = chroma > CHROMA
    cover_factor = float(np.interp(objects.mean(), COVER, (0, 1, 1, 0)))
    background = ~ndimage.binary_dilation(objects, iterations=2)
    if cover_factor == 0 or background.mean() < 0.1:
        return 0.0
    parts = (
        vividness(pixels, objects),
        background_quality(pixels, background),
        composition(objects),
        sharpness(chroma, objects),
    )
    return cover_factor * float(np.prod(parts)) ** 0.25


def vividness(pixels: np.ndarray, objects: np.ndarray) -> float:
    """Median saturation of the coloured pixels: 0 at 0.5 (dull), 1 at 0.78 (pure)."""
    colours = pixels[objects]
    return _ramp(float(np.median(1 - colours.min(-1) / colours.max(-1))), 0.5, 0.78)


def background_quality(pixels: np.ndarray, background: np.ndarray) -> float:
    """Brightness of the background, from grey (165) to near white (245), times a penalty for mottling."""
    brightness = pixels.mean(-1)
    roughness = np.abs(pixels - ndimage.uniform_filter(pixels, (5, 5, 1))).mean(-1)[background].mean()
    return _ramp(float(np.median(brightness[background])), 165, 245) * _ramp(float(roughness), 14, 2)


def composition(objects: np.ndarray) -> float:
    """Balance of the coloured mass around the centre, times a clear margin of a twelfth of the image's edge."""
    height, width = objects.shape
    rows, columns = np.nonzero(objects)
    offset = np.hypot((rows.mean() + 0.5) / height - 0.5, (columns.mean() + 0.5) / width - 0.5)
    margins = (
        rows.min() / height,
        1 - (rows.max() + 1) / height,
        columns.min() / width,
        1 - (columns.max() + 1) / width,
    )
    return _ramp(float(offset), 0.4, 0.03) * _ramp(float(min(margins)), -0.03, 0.08)


def sharpness(chroma: np.ndarray, objects: np.ndarray) -> float:
    """Fraction of an outline's fall in chroma that happens within three pixels: 0 at 0.5 (smear), 1 at 0.85."""
    outline = objects & ~ndimage.binary_erosion(objects)
    fall = ndimage.maximum_filter(chroma, 3) - ndimage.minimum_filter(chroma, 3)
    paint = ndimage.maximum_filter(chroma, 9)
    return _ramp(float((fall[outline] / paint[outline]).mean()), 0.5, 0.85)


def _ramp(value: float, zero_at: float, one_at: float) -> float:
    """Linear ramp from 0 at `zero_at` to 1 at `one_at`, clipped to [0, 1]."""
    return float(np.clip((value - zero_at) / (one_at - zero_at), 0, 1))
