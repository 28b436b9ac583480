"""Picture files as 8-bit RGB: turned upright, flattened on white, within limits of our own.

A file that is damaged, animated, a vector drawing or a decompression bomb is refused with the reason.
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


def decode_image(data: bytes) -> Image.Image:
    """The picture in a file's bytes, RGB. Raises ValueError with the reason where there is none to be had."""
    if not data:
        raise ValueError("it is empty")
    if data.lstrip()[:5].lower() in (b"<svg ", b"<?xml", b"<html", b"<!doc"):
        raise ValueError("it is text (SVG or HTML), not a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError("it is animated")
            image.load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return to_rgb(ImageOps.exif_transpose(image))


def image_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """The file of an undecoded picture, from its row or from disk. Raises ValueError where it is missing, OSError where gone."""
    if not cell or not (cell.get("bytes") or cell.get("path")):
        raise ValueError("it is missing")
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB: 16 bits scaled down, transparency laid on white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else 1.0
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """A picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
