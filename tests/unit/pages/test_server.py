"""The server of the pages: what an image reveals, temporary folders, and ports."""

from __future__ import annotations

import base64
import io
import os
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, ImageCms, PngImagePlugin

from dpo_mm.data.image_files import decode_image
from dpo_mm.pages import server
from dpo_mm.pages.server import bind, image_html, page_folder
from tests.conftest import noise_image


def shown_png(file: bytes) -> bytes:
    return base64.b64decode(image_html(decode_image(file), alt="left image").partition("base64,")[2].partition('"')[0])


def chunks(png: bytes) -> set[bytes]:
    names, at = set(), 8
    while at < len(png):
        names.add(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return names


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_shown_image_has_pixels_and_nothing_else_of_its_file() -> None:
    """It catches each way in which the files of two models differ: profile, text, resolution, EXIF, comment, gamma."""
    image = noise_image(3, 32)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "model: tuned")
    text.add_itxt("Software", "tuned")
    exif = Image.Exif()
    exif[0x010E] = "tuned"
    plain = shown_png(encoded(image, "PNG"))
    assert chunks(plain) == {b"IHDR", b"IDAT", b"IEND"}
    files = [
        encoded(image, "PNG", icc_profile=profile, pnginfo=text, dpi=(300, 300), exif=exif),
        encoded(image, "PNG", icc_profile=b"damaged"),
        encoded(image, "WEBP", lossless=True, exif=exif, icc_profile=profile),
        encoded(image, "TIFF", dpi=(300, 300), description="tuned"),
        encoded(image.convert("RGBA"), "PNG", icc_profile=profile),
    ]
    for file in files:
        png = shown_png(file)
        assert chunks(png) == chunks(plain) and b"tuned" not in png
        difference = np.asarray(decode_image(png), int) - np.asarray(image, int)
        assert abs(difference).max() <= 1, "sRGB to sRGB may round"
    jpeg = encoded(image, "JPEG", comment=b"tuned", exif=exif, icc_profile=profile, dpi=(300, 300))
    assert chunks(shown_png(jpeg)) == chunks(plain)


def test_shown_image_has_the_colours_of_its_profile() -> None:
    """It catches a profile that is dropped without a conversion: a browser would show other colours than before."""
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, blue = swapped.index(b"rXYZ") + 4, swapped.index(b"bXYZ") + 4
    entry = lambda at: swapped[at : at + 8]
    profile = bytearray(swapped)
    profile[red : red + 8], profile[blue : blue + 8] = entry(blue), entry(red)
    file = encoded(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", icc_profile=bytes(profile))
    pixel = decode_image(shown_png(file)).getpixel((0, 0))
    assert pixel[2] > 250 and pixel[0] < 5  # type: ignore[index]


def test_folders_of_killed_pages_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches a folder of a running page that is removed, and a link to another folder that is followed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outside = tmp_path / "outside"
    names = ("stale", "running", "new")
    for name in names:
        (tmp_path / f"dpo-mm-demo-{name}" / "files").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").touch()
    (tmp_path / "dpo-mm-demo-link").symlink_to(outside)
    with FileLock(tmp_path / "dpo-mm-demo-running" / "lock"):
        old = time.time() - server.FOLDER_SECONDS - 1
        for name in names[:2]:
            os.utime(tmp_path / f"dpo-mm-demo-{name}", (old, old))
        with page_folder() as folder:
            assert folder.is_dir() and folder.parent == tmp_path
            assert [(tmp_path / f"dpo-mm-demo-{name}").exists() for name in names] == [False, True, True]
        assert not folder.exists()
    assert (outside / "file").exists()


def test_port_in_use_is_named() -> None:
    with bind(None, "127.0.0.1") as first, bind(None, "127.0.0.1") as second:
        used = first.getsockname()[1]
        assert second.getsockname()[1] > used >= server.FIRST_PORT
        with pytest.raises(OSError, match=f"port {used} cannot be used .*Choose another --port"):
            bind(used, "127.0.0.1")
    assert isinstance(first, socket.socket)


def test_page_that_nobody_uses_rarely_looks_at_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts the sleeps of Gradio's loop in one simulated second."""
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as blocks:
        gradio.Markdown("empty")
    server.application(server.DemoPage(blocks))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        blocks._queue.stopped = sum(slept) >= 1

    monkeypatch.setattr("gradio.queueing.asyncio.sleep", sleep)
    with pytest.raises(StopIteration):  # it has reached its end without waiting for anything
        blocks._queue.start_processing().send(None)
    assert sum(slept) >= 1 and len(slept) <= 51
