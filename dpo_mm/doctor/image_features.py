"""What of a picture can be said without understanding it: its file, its size, its light, and a perceptual hash."""

from __future__ import annotations

import hashlib
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.data.image_files import decode_image, image_bytes

FEATURES = ("resolution", "aspect", "bytes", "png", "jpeg", "webp", "brightness", "contrast", "saturation")
"""Of a side: logs of pixels, width over height and bytes; whether its format is that; light on 0 to 1."""
SMALL, THUMB = 64, 4


class Look(NamedTuple):
    """A picture seen. features: (len(FEATURES),); digest: of its pixels; hash: 64 bits; thumb: (48,) of 0 to 255."""

    features: np.ndarray
    digest: int
    hash: int
    thumb: np.ndarray
    format: str
    size: tuple[int, int]


def look(cell: Any) -> Look | str:
    """A picture as facts, or why it does not decode."""
    try:
        data = image_bytes(cell)
        image = decode_image(data)
    except (ValueError, OSError) as error:
        return str(error)
    kind = Image.open(io.BytesIO(data)).format or "?"
    small = image.resize((SMALL, SMALL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.asarray(small, dtype=np.float32) / 255
    red, green, blue = (pixels[:, :, n] for n in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    colour = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    features = [
        np.log(image.width * image.height),
        np.log(image.width / image.height),
        np.log(len(data)),
        kind == "PNG",
        kind == "JPEG",
        kind == "WEBP",
        grey.mean(),
        grey.std(),
        colour.mean(),
    ]
    digest = hashlib.blake2b(image.tobytes(), digest_size=8, key=str(image.size).encode()).digest()
    thumb = np.asarray(small.resize((THUMB, THUMB), Image.Resampling.BOX), dtype=np.uint8).reshape(-1)
    return Look(
        np.array(features, dtype=np.float32), int.from_bytes(digest, "little"), _hash(small), thumb, kind, image.size
    )


def _hash(small: Image.Image) -> int:
    """A perceptual hash of 64 bits: pictures that look alike differ in few of them (imagehash, phash)."""
    import imagehash

    bits = imagehash.phash(small).hash.reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
