"""Pictures of base and tuned side by side, as one image that can be sent to someone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PIXELATED = 128  # pixels; smaller images are enlarged without smoothing


@dataclass(frozen=True)
class Example:
    """One prompt drawn by both models from one seed. Scores of 0 and 1 throughout are shown as wrong and right."""

    prompt: str
    category: str
    base: Image.Image
    tuned: Image.Image
    base_score: float | None = None
    tuned_score: float | None = None
    seed: int = 0


def contact_sheet(examples: Sequence[Example], *, tile: int = 176, columns: int = 8) -> Image.Image:
    """The examples side by side, base above tuned, each with its judgement and prompt.

    examples: at least one. tile: pixels a side. Returns an RGB image as wide as the row of at most `columns` examples.
    """
    gap, caption, margin = 10, 58, 64
    columns = min(columns, len(examples))
    height = 2 * (tile + gap) + caption
    bands = math.ceil(len(examples) / columns)
    sheet = Image.new("RGB", (margin + columns * (tile + gap) + gap, bands * height + 2 * gap), "#ffffff")
    draw, only = ImageDraw.Draw(sheet), exact(examples)
    for place, example in enumerate(examples):
        left, top = margin + (place % columns) * (tile + gap), gap + place // columns * height
        pair = ((example.base, example.base_score), (example.tuned, example.tuned_score))
        for row, (image, score) in enumerate(pair):
            corner = (left, top + row * (tile + gap))
            sheet.paste(_fitted(image, tile), corner)
            _stamp(draw, mark_of(score, only), corner, tile)
            if place % columns == 0:
                words = ("base", "tuned")[row]
                draw.text((margin - 12, corner[1] + tile // 2), words, "#55555c", _font(15), anchor="rm")
        words = "\n".join(textwrap.wrap(example.prompt, tile // 8, max_lines=3, placeholder=" …"))
        draw.multiline_text((left, top + 2 * (tile + gap) - 4), words, "#1c1c1f", _font(13), spacing=3)
    return sheet


def mark_of(score: float | None, exact: bool) -> str:
    """How a judgement is shown: "right", "wrong", a number, or nothing."""
    if score is None:
        return ""
    return ("wrong", "right")[int(score)] if exact else f"{score:.3g}"


def exact(examples: Sequence[Example]) -> bool:
    """Whether all scores are 0 or 1, (examples,) twice: right or wrong rather than a number."""
    return all(score in (None, 0, 1) for example in examples for score in (example.base_score, example.tuned_score))


def rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB, transparency over white."""
    whole = image.convert("RGBA")
    ground = Image.new("RGBA", whole.size, "white")
    return Image.alpha_composite(ground, whole).convert("RGB")


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The image in a square of `side` pixels, its proportions kept."""
    whole = rgb(image)
    scale = side / max(whole.size)
    size = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
    sampler = Image.Resampling.NEAREST if max(whole.size) < PIXELATED else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), "#f0efec")
    square.paste(whole.resize(size, sampler), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _stamp(draw: ImageDraw.ImageDraw, mark: str, corner: tuple[int, int], tile: int) -> None:
    """Draw a judgement into the lower right of a tile: check, cross or number."""
    if not mark:
        return
    right, bottom = corner[0] + tile - 6, corner[1] + tile - 6
    if mark not in ("right", "wrong"):
        draw.text((right, bottom), mark, "#1c1c1f", _font(13), anchor="rd", stroke_width=3, stroke_fill="#ffffff")
        return
    x, y = right - 11, bottom - 11
    draw.ellipse((x - 12, y - 12, x + 12, y + 12), "#1a7f4b" if mark == "right" else "#b3382c", "#ffffff", 2)
    if mark == "right":
        draw.line((x - 5, y + 1, x - 1, y + 5, x + 6, y - 5), "#ffffff", 3)
    else:
        draw.line((x - 4, y - 4, x + 4, y + 4), "#ffffff", 3)
        draw.line((x - 4, y + 4, x + 4, y - 4), "#ffffff", 3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
