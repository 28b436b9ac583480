"""Trivial features of an image: its file, size, brightness and colour, and a perceptual hash."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.data.image_files import decode_image, image_bytes, open_image

FEATURES = ("resolution", "aspect", "bytes", "png", "jpeg", "webp", "brightness", "contrast", "saturation")
"""Features of an image: logs of pixels, aspect ratio and bytes. 1 for its format. Brightness and colour from 0 to 1."""
SMALL_SIZE, THUMBNAIL_SIZE = 64, 4


class ImageFeatures(NamedTuple):
    """Features and digests of a decoded image.

    Args:
        features: values of FEATURES, (len(FEATURES),).
        digest: 64-bit hash of the pixels.
        hash: 64-bit perceptual hash.
        thumbnail: 4x4 RGB pixels, (48,), 0 to 255.
        format: PIL's name of the file format.
        size: width and height in pixels.
    """

    features: np.ndarray
    digest: int
    hash: int
    thumbnail: np.ndarray
    format: str
    size: tuple[int, int]


def extract_features(cell: Any) -> ImageFeatures | str:
    """Return the features of an image cell, or the reason why it does not decode."""
    try:
        data = image_bytes(cell)
        image = decode_image(data)
    except (ValueError, OSError) as error:
        return str(error)
    format = open_image(data).format or "?"
    small = image.resize((SMALL_SIZE, SMALL_SIZE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.asarray(small, dtype=np.float32) / 255
    red, green, blue = (pixels[:, :, n] for n in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    colour = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    features = [
        np.log(image.width * image.height),
        np.log(image.width / image.height),
        np.log(len(data)),
        format == "PNG",
        format == "JPEG",
        format == "WEBP",
        grey.mean(),
        grey.std(),
        colour.mean(),
    ]
    digest = hashlib.blake2b(image.tobytes(), digest_size=8, key=str(image.size).encode()).digest()
    box = small.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    thumbnail = np.asarray(box, dtype=np.uint8).reshape(-1)
    return ImageFeatures(
        np.array(features, dtype=np.float32),
        int.from_bytes(digest, "little"),
        _perceptual_hash(small),
        thumbnail,
        format,
        image.size,
    )


def _perceptual_hash(small: Image.Image) -> int:
    """64-bit perceptual hash: images that look alike differ in few bits (imagehash, phash)."""
    import imagehash

    bits = imagehash.phash(small).hash.reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
