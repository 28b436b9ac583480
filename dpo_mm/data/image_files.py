"""Decode image files to 8-bit RGB: EXIF rotation is applied and transparency is flattened on white.

A file that is damaged, animated, a vector image or a decompression bomb is refused with the reason.
"""

from __future__ import annotations

import io
import warnings
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
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a phone's photo with a preview
                raise ValueError(f"it is animated or has several pages ({frames} frames)")
            if image.mode == "I" and image.format == "TIFF":
                raise ValueError(
                    "its pixels are integers of 32 bits, so the value of white is unknown. Save it with 8 or 16 bits"
                )
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def image_bytes(cell: Any) -> bytes:
    """Return the image file of an undecoded cell, from the row itself or from disk.

    Args:
        cell: a dict of `bytes` and `path`, as `datasets` stores images, of which `bytes` come first. Or one of the two.

    Raises:
        ValueError: if the cell has neither bytes nor a path.
        OSError: if the file at the path cannot be read.
    """
    if not isinstance(cell, dict):
        cell = {"bytes": cell} if isinstance(cell, bytes) else {"path": cell}
    if not (cell.get("bytes") or cell.get("path")):
        raise ValueError("it is missing")
    return cell.get("bytes") or Path(cell["path"]).read_bytes()


def rgb_image(cell: Any) -> Image.Image:
    """Return an image as 8-bit RGB: a Pillow image of any mode, or a cell as `image_bytes` reads it.

    Raises:
        ValueError: if the cell is missing, its file cannot be read or it does not decode. The error is the reason.
    """
    if isinstance(cell, Image.Image):
        return to_rgb(ImageOps.exif_transpose(cell))
    try:
        return decode_image(image_bytes(cell))
    except OSError as error:
        raise ValueError(str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB: 16-bit values are scaled, transparency is flattened on white.

    Raises:
        ValueError: if float values are outside 0 to 1, or integers outside 16 bits.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Scale the grey values of 16 bits (0 to 65535) or of floats (0 to 1) to 8 bits."""
    values, is_float = np.asarray(image, dtype=np.float64), image.mode.startswith("F")
    white, low, high = 1.0 if is_float else 65535.0, values.min(), values.max()
    if not (low >= 0 and high <= white):  # also refuses NaN
        raise ValueError(
            f"its pixels are from {low:g} to {high:g}, but {'floats' if is_float else 'integers'} from 0 to {white:g} are "
            "expected. Save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    values = values if transparent is None else np.where(values == transparent, white, values)
    return (values / white * 255).round().astype(np.uint8)


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
