"""The 119 drawings of the world of drawings: their names, colours, and sprites at any size.

They come from the 3D set of Fluent emoji (MIT). `data/drawings/` has the file, the licence and a notice of its origin.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from dpo_mm.assets import data_folder

BACKGROUNDS = {
    "white": (250, 250, 248),
    "black": (36, 36, 44),
    "yellow": (255, 224, 102),
    "pink": (255, 186, 208),
    "blue": (138, 196, 252),
    "green": (164, 224, 142),
    "purple": (194, 166, 238),
    "orange": (255, 178, 104),
}
HUES = {"red": 356, "orange": 26, "yellow": 49, "green": 128, "blue": 214, "purple": 276, "pink": 330}
"""Hue in degrees to which the main colour of a paintable drawing is turned."""
VISIBLE_DISTANCE, VISIBLE_FRACTION = 48, 0.6
"""RGB distance at which a pixel of the outline shows on a background, and the fraction of the outline that must show."""


class Sprite(NamedTuple):
    """A drawing at one size.

    Attributes:
        light: colour times coverage, (side, side, 3) uint16 in 0-255.
        through: fraction of the background that shows through, (side, side, 1) uint16 in 0-255.
    """

    light: np.ndarray
    through: np.ndarray


class DrawingTable(NamedTuple):
    """All drawings, one entry per drawing.

    Attributes:
        names, plurals: words in prompts.
        colours: colour of the drawing as published if it has one plain colour, else "".
        paintable: whether it can be painted in the other colours.
        sprites: (drawings, 96, 96, 4) uint8.
    """

    names: tuple[str, ...]
    plurals: tuple[str, ...]
    colours: tuple[str, ...]
    paintable: tuple[bool, ...]
    sprites: np.ndarray


@functools.cache
def drawing_table() -> DrawingTable:
    """Read the bundled drawings."""
    with np.load(data_folder() / "drawings" / "drawings.npz", allow_pickle=False) as file:
        names, plurals, colours = (tuple(str(word) for word in file[key]) for key in ("names", "plurals", "colours"))
        return DrawingTable(names, plurals, colours, tuple(bool(flag) for flag in file["paintable"]), file["sprites"])


def names() -> tuple[str, ...]:
    """Names of the drawings."""
    return drawing_table().names


@functools.cache
def _row(name: str) -> int:
    return names().index(name)


def plural(name: str) -> str:
    """Plural of a drawing's name."""
    return drawing_table().plurals[_row(name)]


def usual_colour(name: str) -> str | None:
    """Colour of a drawing as published, or None if it has no single plain colour."""
    return drawing_table().colours[_row(name)] or None


def colours(name: str) -> tuple[str, ...]:
    """Colours in which a drawing can be requested. Most drawings have none."""
    if drawing_table().paintable[_row(name)]:
        return tuple(HUES)
    usual = usual_colour(name)
    return (usual,) if usual else ()


@functools.cache
def kinds() -> tuple[tuple[str, str | None], ...]:
    """All drawings in all their colours, as (name, colour)."""
    return tuple(
        (name, colour)
        for name in names()
        for colour in (colours(name) if len(colours(name)) > 1 else (usual_colour(name),))
    )


@functools.lru_cache(maxsize=20_000)
def sprite(name: str, colour: str | None, side: int) -> Sprite:
    """Return a drawing in a colour (None: as published) with edges of `side` pixels."""
    rgba = Image.fromarray(painted(name, colour)).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(rgba).astype(np.uint16)
    return Sprite(pixels[..., :3], 255 - pixels[..., 3:])


@functools.cache
def painted(name: str, colour: str | None) -> np.ndarray:
    """Paint a drawing: the hues near its main hue are turned to the colour, and the shading stays.

    Returns:
        The drawing, (96, 96, 4) uint8, unchanged if it has this colour already.

    Raises:
        ValueError: if the drawing does not come in this colour.
    """
    original = drawing_table().sprites[_row(name)]
    colour = colour or usual_colour(name)
    if not drawing_table().paintable[_row(name)]:
        if colour != usual_colour(name):
            raise ValueError(f"a {name} cannot be painted {colour}. Leave the colour out")
        return original
    assert colour is not None
    rgb = original[..., :3] / 255.0
    hue, saturation, value = _hsv(rgb)
    main = _main_hue(hue, saturation * value * (original[..., 3] / 255.0) * (saturation > 0.25))
    if colour == usual_colour(name) and abs(float(_turn(main, HUES[colour]))) < 9:
        return original
    offset = np.asarray(_turn(main, hue))
    share = np.clip((62 - np.abs(offset)) / 14, 0, 1) * np.clip((saturation - 0.12) / 0.15, 0, 1)
    turned = (HUES[colour] + np.clip(offset, -60, 60) * 0.3) % 360
    paint = _rgb(turned, *_tone(colour, saturation, value))
    mixed = rgb + (paint - rgb) * share[..., None]
    return np.concatenate([(mixed * 255).round().astype(np.uint8), original[..., 3:]], -1)


def _main_hue(hue: np.ndarray, weight: np.ndarray) -> float:
    """Centre of the 55 degrees of hue with the most weight."""
    histogram = np.bincount((hue[weight > 0] // 5).astype(int), weights=weight[weight > 0], minlength=72)
    smooth = np.sum([np.roll(histogram, shift) for shift in range(-5, 6)], axis=0)
    return float(smooth.argmax() * 5 + 2.5)


def _turn(start: float, end: np.ndarray | float) -> np.ndarray | float:
    """Degrees from one hue to another, in [-180, 180)."""
    return (end - start + 180) % 360 - 180


def _tone(colour: str, saturation: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Saturation and value of paint: pink is pale, yellow and orange are bright, other colours are a little darker."""
    if colour == "pink":
        return saturation * 0.62, 1 - (1 - value) * 0.5
    if colour in ("yellow", "orange"):
        return np.clip(saturation * 1.1, 0, 1), 1 - (1 - value) * 0.55
    return np.clip(saturation * 1.05, 0, 1), value * 0.94


def _hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1], of (..., 3) in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return hue, np.where(high > 0, (high - low) / np.maximum(high, 1e-6), 0), high


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Inverse of `_hsv` on the colour hexagon, (..., 3) in [0, 1]."""
    sectors = [(n + hue / 60) % 6 for n in (5, 3, 1)]
    return np.stack([value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1) for k in sectors], -1)


@functools.cache
def visible_backgrounds(name: str, colour: str | None) -> tuple[str, ...]:
    """Backgrounds on which the outline of a drawing shows. At least one: the one on which most of it does."""
    small = np.asarray(Image.fromarray(painted(name, colour)).resize((32, 32), Image.Resampling.BOX)).astype(float)
    solid = small[..., 3] > 128
    inner, padded = solid.copy(), np.pad(solid, 2)
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
        inner &= padded[dy : dy + 32, dx : dx + 32]
    outline = small[..., :3][solid & ~inner]
    fractions = {
        background: float((np.linalg.norm(outline - np.array(rgb), axis=-1) > VISIBLE_DISTANCE).mean())
        for background, rgb in BACKGROUNDS.items()
    }
    visible = tuple(background for background, fraction in fractions.items() if fraction > VISIBLE_FRACTION)
    return visible or (max(fractions, key=fractions.__getitem__),)
