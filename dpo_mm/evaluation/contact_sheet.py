"""Images of base and tuned as one contact sheet."""

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
    """Images of both models for one prompt and seed.

    Args:
        prompt, category, seed: of both images.
        base, tuned: the images.
        base_score, tuned_score: the primary judge's scores. If all scores of a page are 0 or 1, they are shown as wrong
            and right.
        sources: images to edit, which both models got.
        is_clip: the images are frames of clips, side by side.
    """

    prompt: str
    category: str
    base: Image.Image
    tuned: Image.Image
    base_score: float | None = None
    tuned_score: float | None = None
    seed: int = 0
    sources: tuple[Image.Image, ...] = ()
    is_clip: bool = False


@dataclass(frozen=True)
class MostChanged:
    """Examples whose score changed most, the largest change first.

    Args:
        improved, worsened: examples that got better and worse.
    """

    improved: tuple[Example, ...] = ()
    worsened: tuple[Example, ...] = ()

    @property
    def all(self) -> tuple[Example, ...]:
        """All of them."""
        return self.improved + self.worsened


def contact_sheet(examples: Sequence[Example], *, tile: int = 176, columns: int = 8) -> Image.Image:
    """Draw the examples next to each other, base above tuned, each with its score and prompt.

    The images to edit are above the base's, if there are any.

    Args:
        examples: at least one.
        tile: edge of an image, pixels.
        columns: examples per row, at most.

    Returns:
        An RGB image.
    """
    gap, caption, margin = 10, 58, 64
    columns = min(columns, len(examples))
    sources = any(example.sources for example in examples)
    rows = 3 if sources else 2
    height = rows * (tile + gap) + caption
    bands = math.ceil(len(examples) / columns)
    sheet = Image.new("RGB", (margin + columns * (tile + gap) + gap, bands * height + 2 * gap), "#ffffff")
    draw, exact = ImageDraw.Draw(sheet), has_exact_scores(examples)
    for index, example in enumerate(examples):
        left, y = margin + (index % columns) * (tile + gap), gap + index // columns * height
        shown = [("base", example.base, example.base_score), ("tuned", example.tuned, example.tuned_score)]
        if sources:
            shown.insert(0, ("source", _side_by_side(example.sources, tile), None))
        for row, (name, image, score) in enumerate(shown):
            corner = (left, y + row * (tile + gap))
            sheet.paste(_fit(image, tile), corner)
            _stamp(draw, mark_of(score, exact), corner, tile)
            if index % columns == 0:
                draw.text((margin - 12, corner[1] + tile // 2), name, "#55555c", _font(15), anchor="rm")
        prompt = "\n".join(textwrap.wrap(example.prompt, tile // 8, max_lines=3, placeholder=" …"))
        draw.multiline_text((left, y + rows * (tile + gap) - 4), prompt, "#1c1c1f", _font(13), spacing=3)
    return sheet


def strips(
    rows: Sequence[Sequence[Image.Image]],
    heads: Sequence[str],
    prompts: Sequence[str],
    marks: Sequence[Sequence[str]],
    *,
    tile: int = 176,
) -> Image.Image:
    """Draw one strip of images per prompt, with the prompt above it.

    Args:
        rows: images of each prompt, as many as heads.
        heads: title of each column.
        prompts: prompt of each row.
        marks: score of each image as text, possibly "".
        tile: edge of an image, pixels.

    Returns:
        An RGB image.
    """
    gap, title, top = 10, 26, 34
    width = max(len(heads) * (tile + gap) + gap, 360)
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + gap + title)), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((gap + column * (tile + gap), gap), head, "#55555c", _font(15))
    for row, (images, prompt) in enumerate(zip(rows, prompts, strict=True)):
        y = top + row * (tile + gap + title)
        text = textwrap.shorten(prompt, max(20, (width - 2 * gap) // 8), placeholder=" …")
        draw.text((gap, y), text, "#1c1c1f", _font(13))
        for column, image in enumerate(images):
            corner = (gap + column * (tile + gap), y + title - 6)
            sheet.paste(_fit(image, tile), corner)
            _stamp(draw, marks[row][column], corner, tile)
    return sheet


def mark_of(score: float | None, exact: bool) -> str:
    """Return a score's text: "right" or "wrong" if scores are exact, else a number. Empty without a score."""
    if score is None:
        return ""
    return ("wrong", "right")[int(score)] if exact else f"{score:.3g}"


def has_exact_scores(examples: Sequence[Example]) -> bool:
    """Return whether all scores are 0 or 1, so that they are shown as wrong or right."""
    return all(score in (None, 0, 1) for example in examples for score in (example.base_score, example.tuned_score))


def rgb(image: Image.Image) -> Image.Image:
    """Convert a copy to RGB, with white behind transparent pixels."""
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(background, rgba).convert("RGB")


def _fit(image: Image.Image, edge: int) -> Image.Image:
    """Fit an image into a square of `edge` pixels without distortion."""
    image = rgb(image)
    scale = edge / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if max(image.size) < PIXELATED else Image.Resampling.LANCZOS
    square = Image.new("RGB", (edge, edge), "#f0efec")
    square.paste(image.resize(size, resampling), ((edge - size[0]) // 2, (edge - size[1]) // 2))
    return square


def _side_by_side(images: Sequence[Image.Image], edge: int) -> Image.Image:
    """Return the images next to each other in a square, each fitted without distortion. Empty without images."""
    if len(images) == 1:
        return images[0]
    part = edge // max(1, len(images))
    square = Image.new("RGB", (edge, edge), "#f0efec")
    for number, image in enumerate(images):
        square.paste(_fit(image, part), (number * part, (edge - part) // 2))
    return square


def _stamp(draw: ImageDraw.ImageDraw, mark: str, corner: tuple[int, int], tile: int) -> None:
    """Draw a score into the lower right of a tile: check mark, cross or number."""
    if not mark:
        return
    right, bottom = corner[0] + tile - 6, corner[1] + tile - 6
    if mark not in ("right", "wrong"):
        draw.text((right, bottom), mark, "#1c1c1f", _font(13), anchor="rd", stroke_width=3, stroke_fill="#ffffff")
        return
    x, y = right - 11, bottom - 11
    draw.ellipse((x - 12, y - 12, x + 12, y + 12), "#00705a" if mark == "right" else "#b34000", "#ffffff", 2)
    if mark == "right":
        draw.line((x - 5, y + 1, x - 1, y + 5, x + 6, y - 5), "#ffffff", 3)
    else:
        draw.line((x - 4, y - 4, x + 4, y + 4), "#ffffff", 3)
        draw.line((x - 4, y + 4, x + 4, y - 4), "#ffffff", 3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
