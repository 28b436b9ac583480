"""Decode image files to 8-bit RGB: EXIF rotation is applied and transparency is flattened on white.

A file that is damaged, animated, a vector image or a decompression bomb is refused with the reason.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
"""Largest number of pixels of an image. Larger ones are refused."""


def decode_image(data: bytes) -> Image.Image:
    """Decode the bytes of an image file to an RGB image.

    Raises:
        ValueError: if the file is empty, damaged, animated, text (SVG, HTML) or has more than MAX_PIXELS pixels.
    """
    if not data:
        raise ValueError("it is empty")
    if data.lstrip()[:5].lower() in (b"<svg ", b"<?xml", b"<html", b"<!doc"):
        raise ValueError("it is text (SVG or HTML), not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's photo with a preview
                raise ValueError("it is animated")
            image.load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return to_rgb(ImageOps.exif_transpose(image))


def image_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """Return the image file of an undecoded cell, from the row itself or from disk.

    Args:
        cell: `bytes` and `path`, as `datasets` stores images. `bytes` come first.

    Raises:
        ValueError: if the cell has neither bytes nor a path.
        OSError: if the file at the path cannot be read.
    """
    if not cell or not (cell.get("bytes") or cell.get("path")):
        raise ValueError("it is missing")
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB: 16-bit values are scaled, transparency is flattened on white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else 1.0
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
