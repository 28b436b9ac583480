"""What a run showed, on one page that can be sent to someone: report.html, metrics.json and a contact sheet.

The page is one file: images are PNG data URIs, charts are inline SVG in the page's own colours, there is no script and
a policy that forbids any. Everything from outside (prompts, texts, names, settings) is escaped by the template.

A comparison is shown in per cent where its metric's name has one of the words of `RATES` and its values are within
[0, 1]; metrics.json always holds fractions. Categories, LoRA scales and the control are shown as the headline is.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image, ImageDraw, ImageFont

from dpo_mm.evaluation.charts import history_charts, scale_chart
from dpo_mm.evaluation.statistics import Comparison

if TYPE_CHECKING:
    from rich.table import Table

RATES = re.compile(r"\b(rates?|right|share|accuracy|recall|CHAIR_[is])\b", re.IGNORECASE)
TONES = {"better": "good", "worse": "bad", "over-optimised": "warn"}
LARGEST = 384  # pixels a side on the page; larger images are shrunk to it
PIXELATED = 128  # pixels; smaller images are enlarged without smoothing
LOOP = re.compile(r"(.{1,200}?)\1{2,}", re.DOTALL)
FOLDED, SHOWN = 80, 24  # characters; a longer run of repeats is folded, but for so much of it


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


@dataclass(frozen=True)
class TextExample:
    """One image read by both models. Marks: (start, end) in characters, what the judge found invented."""

    image: Image.Image | None
    prompt: str
    base: str
    tuned: str
    truth: str | None = None
    base_marks: tuple[tuple[int, int], ...] = ()
    tuned_marks: tuple[tuple[int, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. Raises ValueError unless exactly one of `comparisons` is the headline.

    categories: the headline's metric within each, `metric` holding the category's name. scales: LoRA scale and the
    base against the adapter at it. control: base against base with other seeds. history: the trainer's log entries,
    each with "step" and any of the names in `charts.PANELS`. notes: honest remarks, a sentence or two each.
    """

    title: str
    verdict: str
    summary: str
    command: str
    comparisons: tuple[Comparison, ...]
    categories: tuple[Comparison, ...] = ()
    scales: tuple[tuple[float, Comparison], ...] = ()
    control: Comparison | None = None
    history: tuple[dict[str, float], ...] = ()
    examples: tuple[Example, ...] = ()
    text_examples: tuple[TextExample, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        headlines = [comparison.metric for comparison in self.comparisons if comparison.headline]
        if len(headlines) != 1:
            raise ValueError(f"{len(headlines)} headline comparisons {headlines}: mark exactly one as headline=True")

    @property
    def headline(self) -> Comparison:
        return next(comparison for comparison in self.comparisons if comparison.headline)


@dataclass(frozen=True)
class Row:
    """A comparison as words, and its interval on a track with 0 in the middle: left, width and dot in per cent."""

    metric: str
    judge: str
    headline: bool
    base: str
    tuned: str
    difference: str
    interval: str
    verdict: str
    tone: str
    votes: str
    n: int
    clusters: int
    left: float
    width: float
    dot: float


@dataclass(frozen=True)
class Piece:
    """A stretch of a text; marked: the judge objects to it; repeats: > 0 where it is the folded rest of a loop."""

    text: str
    marked: bool = False
    repeats: int = 0


def write_report(folder: Path, report: Report) -> Path:
    """Write report.html, metrics.json and, where there are image examples, contact_sheet.png into the folder.

    Each is written aside and renamed, so that a failure leaves the file before it. Returns the path of the page.
    Raises ValueError where a mark lies outside its text; OSError where the folder can't be written.
    """
    page = render(report).encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = json.dumps(_metrics(report), indent=2, ensure_ascii=False, allow_nan=False).encode()
    _write(folder / "metrics.json", lambda file: file.write(metrics))
    if report.examples:
        sheet = contact_sheet(report.examples)
        _write(folder / "contact_sheet.png", lambda file: sheet.save(file, format="PNG"))
    return _write(folder / "report.html", lambda file: file.write(page))


def render(report: Report) -> str:
    """The page as HTML, everything inlined and escaped. Raises ValueError where a mark lies outside its text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(picture=_picture, pieces=pieces, mark=_mark)
    template = environment.from_string(resources.files("dpo_mm.evaluation").joinpath("report.html").read_text("utf-8"))
    percent = is_rate(report.headline)
    rows = _rows(report.comparisons)
    return template.render(
        report=report,
        tone=TONES.get(report.verdict, "none"),
        rows=rows,
        headline=next(row for row in rows if row.headline),
        categories=_rows(report.categories, percent),
        control=_rows((report.control,), percent)[0] if report.control else None,
        scales=_rows([comparison for _, comparison in report.scales], percent),
        sweep=Markup(scale_chart(report.scales, percent)),  # drawn here, with no text from outside
        charts=[(chart.title, Markup(chart.svg)) for chart in history_charts(report.history)],
        exact=_exact(report.examples),
    )


def terminal_table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons as a table for the end of a command."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", border_style="dim")
    for name in ("metric", "base", "tuned", "difference", "95 % interval", "verdict"):
        table.add_column(name, justify="left" if name in ("metric", "verdict") else "right")
    for within, group in itertools.groupby(_rows(comparisons), lambda row: row.metric.partition(" (")[2]):
        if within:
            table.add_row(Text(within.rstrip(")"), style="italic"))
        for row in group:
            metric = Text(row.metric.partition(" (")[0], style="bold" if row.headline else "")
            tone = {"good": "green", "bad": "red"}.get(row.tone, "dim")
            table.add_row(metric, row.base, row.tuned, row.difference, row.interval, Text(row.verdict, tone))
    return table


def is_rate(comparison: Comparison) -> bool:
    """Whether to show it in per cent: a word of `RATES` in the metric's name, and values within [0, 1]."""
    return all(0 <= value <= 1 for value in (comparison.base, comparison.tuned)) and bool(
        RATES.search(comparison.metric)
    )


def pieces(text: str, marks: Sequence[tuple[int, int]] = ()) -> list[Piece]:
    """A text cut where marks begin and end, long loops folded after their first rounds; the pieces join to the text.

    marks: (start, end) in characters, start <= end, may overlap. Raises ValueError where one lies outside the text.
    """
    for start, end in marks:
        if not 0 <= start <= end <= len(text):
            raise ValueError(f"mark ({start}, {end}) lies outside its text of {len(text)} characters")
    cut: list[Piece] = []
    place = 0
    for start, end, repeats in _loops(text):
        marked = any(a < end and start < b for a, b in marks)
        cut += [*_marked(text, place, start, marks), Piece(text[start:end], marked, repeats)]
        place = end
    return cut + _marked(text, place, len(text), marks)


def contact_sheet(examples: Sequence[Example], *, tile: int = 176, columns: int = 8) -> Image.Image:
    """The examples side by side, base above tuned, each with its judgement and prompt.

    examples: at least one. tile: pixels a side. Returns an RGB image as wide as the row of at most `columns` examples.
    """
    gap, caption, margin = 10, 58, 64
    columns = min(columns, len(examples))
    height = 2 * (tile + gap) + caption
    bands = math.ceil(len(examples) / columns)
    sheet = Image.new("RGB", (margin + columns * (tile + gap) + gap, bands * height + 2 * gap), "#ffffff")
    draw, exact = ImageDraw.Draw(sheet), _exact(examples)
    for place, example in enumerate(examples):
        left, top = margin + (place % columns) * (tile + gap), gap + place // columns * height
        pair = ((example.base, example.base_score), (example.tuned, example.tuned_score))
        for row, (image, score) in enumerate(pair):
            corner = (left, top + row * (tile + gap))
            sheet.paste(_fitted(image, tile), corner)
            _stamp(draw, _mark(score, exact), corner, tile)
            if place % columns == 0:
                words = ("base", "tuned")[row]
                draw.text((margin - 12, corner[1] + tile // 2), words, "#55555c", _font(15), anchor="rm")
        words = "\n".join(textwrap.wrap(example.prompt, tile // 8, max_lines=3, placeholder=" …"))
        draw.multiline_text((left, top + 2 * (tile + gap) - 4), words, "#1c1c1f", _font(13), spacing=3)
    return sheet


def _metrics(report: Report) -> dict[str, Any]:
    """What metrics.json holds; numbers that are not finite (a skipped step's loss) become null."""
    return {
        "title": report.title,
        "verdict": report.verdict,
        "summary": report.summary,
        "command": report.command,
        "comparisons": [comparison.as_dict() for comparison in report.comparisons],
        "categories": [comparison.as_dict() for comparison in report.categories],
        "scales": [{"scale": float(scale), **comparison.as_dict()} for scale, comparison in report.scales],
        "control": report.control.as_dict() if report.control else None,
        "settings": report.settings,
        "notes": list(report.notes),
        "history": [{k: float(v) if math.isfinite(v) else None for k, v in entry.items()} for entry in report.history],
    }


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """Write aside, then rename: the file is the old one or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _rows(comparisons: Sequence[Comparison], percent: bool | None = None) -> list[Row]:
    """Rates share one track, so do all of them where `percent` is given; every other metric has its own."""
    shown = [is_rate(comparison) if percent is None else percent for comparison in comparisons]
    reach = [max(abs(c.low), abs(c.high), 1e-9) for c in comparisons]
    shared = max((one for one, rate in zip(reach, shown, strict=True) if rate or percent is not None), default=1.0)
    return [
        _row(comparison, rate, shared if rate or percent is not None else own)
        for comparison, rate, own in zip(comparisons, shown, reach, strict=True)
    ]


def _row(one: Comparison, percent: bool, reach: float) -> Row:
    left, right, dot = (50 + 46 * value / reach for value in (one.low, one.high, one.difference))
    places = 1 if percent else _places(one)
    low, high = (_signed(value, percent, places) for value in (one.low, one.high))
    return Row(
        metric=one.metric,
        judge=one.judge,
        headline=one.headline,
        base=_plain(one.base, percent, places),
        tuned=_plain(one.tuned, percent, places),
        difference=_signed(one.difference, percent, places) + (" pts" if percent else ""),
        interval=f"{low} to {high}",
        verdict=one.verdict,
        tone=TONES.get(one.verdict, "none"),
        votes=f"{one.wins} better, {one.ties} same, {one.losses} worse",
        n=one.n,
        clusters=one.clusters,
        left=round(left, 2),
        width=round(max(right - left, 0.6), 2),
        dot=round(dot, 2),
    )


def _places(one: Comparison) -> int:
    """Decimals that show two digits of the interval, at least two and at most six."""
    width = one.high - one.low
    return min(max(1 - math.floor(math.log10(width)), 2), 6) if width > 0 else 3


def _plain(value: float, percent: bool, places: int) -> str:
    return f"{100 * value:.{places}f} %" if percent else f"{value:.{places}f}".replace("-", "−")


def _signed(value: float, percent: bool, places: int) -> str:
    shown = round((100 if percent else 1) * value, places)
    return f"{shown:+.{places}f}".replace("-", "−") if shown else f"{0:.{places}f}"


def _mark(score: float | None, exact: bool) -> str:
    """How a judgement is shown: "right", "wrong", a number, or nothing."""
    if score is None:
        return ""
    return ("wrong", "right")[int(score)] if exact else f"{score:.3g}"


def _exact(examples: Sequence[Example]) -> bool:
    """Whether all scores are 0 or 1, (examples,) twice: right or wrong rather than a number."""
    return all(score in (None, 0, 1) for example in examples for score in (example.base_score, example.tuned_score))


def _loops(text: str) -> Iterator[tuple[int, int, int]]:
    """Start, end (characters) and rounds of what to fold: a long loop but for its first rounds, about `SHOWN` of it."""
    for match in LOOP.finditer(text):
        period = len(match[1])
        rounds, shown = len(match[0]) // period, math.ceil(SHOWN / period)
        if len(match[0]) > FOLDED:
            yield match.start() + shown * period, match.end(), rounds - shown


def _marked(text: str, start: int, end: int, marks: Sequence[tuple[int, int]]) -> list[Piece]:
    edges = sorted({start, end, *(edge for mark in marks for edge in mark if start < edge < end)})
    spans = itertools.pairwise(edges)
    return [Piece(text[a:b], any(first <= a and b <= last for first, last in marks)) for a, b in spans]


def _picture(image: Image.Image) -> dict[str, Any]:
    """Attributes of an <img>: src, a PNG data URI; width and height in pixels; whether to enlarge without smoothing."""
    small = _rgb(image)
    small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"src": source, "width": small.width, "height": small.height, "pixelated": max(small.size) < PIXELATED}


def _rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB, transparency over white."""
    whole = image.convert("RGBA")
    ground = Image.new("RGBA", whole.size, "white")
    return Image.alpha_composite(ground, whole).convert("RGB")


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The image in a square of `side` pixels, its proportions kept."""
    whole = _rgb(image)
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
