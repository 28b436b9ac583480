"""Decode image files to 8-bit RGB: EXIF rotation is applied and transparency is flattened on white.

A file that is damaged, animated, a vector image or a decompression bomb is refused with the reason.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import warnings
from os import PathLike
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dpo_mm.data.row_paths import read_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF")
"""Formats that Pillow may open. Others start programs (EPS: Ghostscript) or have little-tested decoders."""
SIGNATURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|GIF8[79]a|BM.{4}\x00{4}|II\*\x00|MM\x00\*|P[1-6f]\s+[\d#]|\x00\x00\x01\x00|.{4}ftypavi[fs]",
    re.DOTALL,
)
"""First bytes of the files of FORMATS."""
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
"""Suffixes, in small letters, of the files that count as images of a folder. HEIC is not decoded, but named instead of overlooked."""
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
            image = open_image(data)
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


def open_image(data: bytes) -> Image.Image:
    """Open an image file of one of FORMATS with Pillow, without decoding its pixels.

    Raises:
        OSError: if it is of no such format.
    """
    return Image.open(io.BytesIO(data), formats=_pillow_formats())


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this version of Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def has_image_signature(data: bytes) -> bool:
    """Return True if the first bytes of a file are those of one of FORMATS."""
    return SIGNATURE.match(data) is not None


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the image that `decode_image` gives. Only the header is read.

    Raises:
        ValueError: if the header is not that of an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = open_image(data)
            # Pillow turns a TIFF itself, and decodes a PNG without EXIF in its header to look at its end.
            has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return (image.height, image.width) if turned else image.size


def image_bytes(cell: Any) -> bytes:
    """Return the image file of an undecoded cell, from the row itself or from disk.

    Args:
        cell: a dict of `bytes` and `path`, as `datasets` stores images, of which `bytes` come first. Or one of the two.
            A path of a loaded row leads only to files of its dataset, see `dpo_mm.data.row_paths`.

    Raises:
        ValueError: if the cell has neither bytes nor a path, or the path leads to anything but an image of the dataset.
        OSError: if the file at the path cannot be read.
    """
    if not isinstance(cell, dict):
        cell = {"bytes": cell} if isinstance(cell, bytes) else {"path": cell}
    data, path = cell.get("bytes"), cell.get("path")
    if not (data or path):
        raise ValueError("it is missing")
    if data:
        if not isinstance(data, bytes):
            raise ValueError(f"its bytes are {type(data).__name__}. Expected the content of an image file")
        return data
    if not isinstance(path, str | PathLike):
        raise ValueError(f"it is {type(path).__name__}. Expected an image file or a path")
    data = read_file(str(path))
    if data and not has_image_signature(data):
        raise ValueError(f"{PurePath(path).name[:80]!r} is not an image of a supported format ({', '.join(FORMATS)})")
    return data


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


def data_url(image: Image.Image) -> str:
    """Return an image as the data URL of a PNG file. Raise ValueError if it has no RGB."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(rgb_image(image))).decode()}"
