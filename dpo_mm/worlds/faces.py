"""Fonts of the synthetic pages, and the width of a line in them. matplotlib and Pillow bring the files."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import matplotlib
from PIL import ImageFont

FACES = {
    "sans": "DejaVuSans.ttf",
    "sans bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif italic": "DejaVuSerif-Italic.ttf",
    "mono": "DejaVuSansMono.ttf",
    "aileron": None,  # Pillow's own
}
OVERSAMPLE = 4
"""Factor by which a page is larger while it is drawn."""


def measure(line: str, face: str, size: int) -> float:
    """Width of a line in pixels.

    Raises:
        ValueError: if the face is unknown or its file is missing.
    """
    pairs = itertools.zip_longest(line, line[1:], fillvalue="")
    return sum(_advance(face, size * OVERSAMPLE, *pair) for pair in pairs) / OVERSAMPLE


@functools.cache
def _advance(face: str, size: int, character: str, following: str) -> float:
    """Distance from a character to the one after it, with kerning. The basic layout knows no longer context."""
    font = font_of(face, size)
    return font.getlength(character + following) - font.getlength(following)


@functools.cache
def font_of(face: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font in the basic layout.

    Raises:
        ValueError: if the face is unknown or its file is missing.
    """
    if face not in FACES:
        raise ValueError(f"face {face!r} is unknown; expected one of {', '.join(FACES)}")
    name = FACES[face]
    if name is None:
        return ImageFont.load_default(size)
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    if not path.is_file():
        raise ValueError(f"face {face!r}: {path} is missing. Restore it with pip install --force-reinstall matplotlib.")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
