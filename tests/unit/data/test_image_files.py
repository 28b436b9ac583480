from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_mm.data import image_files


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (8, 4), (200, 20, 20))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (RED, "PNG", (200, 20, 20)),
        (RED.convert("CMYK"), "TIFF", (200, 20, 20)),
        (RED.quantize(4), "PNG", (200, 20, 20)),
        (Image.new("RGBA", (8, 4), (200, 20, 20, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 4), (200, 20, 20, 255)), "PNG", (200, 20, 20)),
        (Image.new("LA", (8, 4), (100, 255)), "PNG", (100, 100, 100)),
        (Image.new("L", (8, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (8, 4), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((4, 8), 32768, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((4, 8), 32768, np.uint16)), "TIFF", (128, 128, 128)),
        (Image.fromarray(np.full((4, 8), 0.5, np.float32)), "TIFF", (128, 128, 128)),
    ],
)
def test_decode_image_every_mode_becomes_rgb(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    decoded = image_files.decode_image(encode(image, kind))
    assert decoded.mode == "RGB" and decoded.size == (8, 4)
    assert np.abs(np.asarray(decoded, dtype=int) - expected).max() <= 1


def test_decode_image_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.paste((0, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = image_files.decode_image(encode(image, "PNG", exif=exif))
    assert decoded.size == (4, 8)
    assert np.asarray(decoded)[:4].max() == 0 and np.asarray(decoded)[4:].min() == 255


def bomb() -> bytes:
    return encode(Image.new("1", (20_000, 10_000)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (encode(RED.resize((64, 64)), "PNG")[:60], "truncated|broken|cannot|Truncated"),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:-200], "truncated"),
        (b"<html><body>404</body></html>", "SVG or HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG or HTML"),
        (b"\x00" * 100, "cannot identify"),
        (
            encode(
                RED,
                "GIF",
                save_all=True,
                append_images=[RED.transpose(Image.Transpose.ROTATE_180).point(lambda v: v // 2)],
            ),
            "animated",
        ),
        (bomb(), "pixels|exceeds"),
        (
            encode(Image.fromarray(np.full((4, 8), 128.0, np.float32)), "TIFF"),
            "from 128 to 128, but floats from 0 to 1 ",
        ),
        (encode(Image.fromarray(np.full((4, 8), np.nan, np.float32)), "TIFF"), "from nan to nan"),
        (encode(Image.fromarray(np.full((4, 8), 128, np.int32)), "TIFF"), "integers of 32 bits"),
    ],
)
def test_decode_image_bad_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        image_files.decode_image(data)


def test_decode_image_transparent_grey_of_16_bits_is_white() -> None:
    """Catches the key of a transparent colour that is lost when 16 bits are scaled."""
    pixels = np.array([[0, 30000]], np.uint16)
    decoded = image_files.decode_image(encode(Image.fromarray(pixels), "PNG", transparency=0))
    assert np.asarray(decoded)[0, :, 0].tolist() == [255, 117]


def test_encode_png_is_lossless() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(image_files.decode_image(image_files.encode_png(noise))), np.asarray(noise))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_from_the_header_is_that_of_the_decoded_image(kind: str) -> None:
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(RED, kind, exif=exif)
        assert image_files.image_size(data) == image_files.decode_image(data).size
    with pytest.raises(ValueError, match="cannot identify"):
        image_files.image_size(b"no image")
