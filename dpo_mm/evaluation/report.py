"""What a run showed, on one page that can be sent to someone: report.html, metrics.json and a contact sheet.

The page is one file: images are PNG data URIs, charts are inline SVG in the page's own colours, there is no script and
a policy that forbids any. Everything from outside (prompts, texts, names, settings) is escaped by the template.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from dpo_mm.evaluation.charts import history_charts, pareto_chart, scale_chart
from dpo_mm.evaluation.contact_sheet import PIXELATED, Example, contact_sheet, exact, mark_of, rgb
from dpo_mm.evaluation.marked_text import TextExample, text_spans
from dpo_mm.evaluation.statistics import LEVEL, Comparison
from dpo_mm.evaluation.sweep import RULE, SweepPoint, advice
from dpo_mm.evaluation.tables import TONES, Row, is_rate, rows_of, terminal_table
from dpo_mm.resumable import atomic_write

__all__ = [
    "Example",
    "Report",
    "TextExample",
    "contact_sheet",
    "is_rate",
    "render",
    "terminal_table",
    "text_spans",
    "write_report",
]

LARGEST = 384  # pixels a side on the page; larger images are shrunk to it


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. Raises ValueError unless exactly one of `comparisons` is the headline.

    categories: the headline's metric within each, `metric` holding the category's name. scales: LoRA scale and the
    base against the adapter at it. points: the same and checkpoints on two judges. control: base against base with other seeds. history: the trainer's log entries,
    each with "step" and any of the names in `charts.PANELS`. notes: honest remarks, a sentence or two each.
    unit: what is drawn at random, in the plural.
    """

    title: str
    verdict: str
    summary: str
    command: str
    comparisons: tuple[Comparison, ...]
    categories: tuple[Comparison, ...] = ()
    scales: tuple[tuple[float, Comparison], ...] = ()
    points: tuple[SweepPoint, ...] = ()
    control: Comparison | None = None
    history: tuple[dict[str, float], ...] = ()
    examples: tuple[Example, ...] = ()
    text_examples: tuple[TextExample, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = "prompts"

    def __post_init__(self) -> None:
        headlines = [comparison.metric for comparison in self.comparisons if comparison.headline]
        if len(headlines) != 1:
            raise ValueError(f"{len(headlines)} headline comparisons {headlines}: mark exactly one as headline=True")

    @property
    def headline(self) -> Comparison:
        return next(comparison for comparison in self.comparisons if comparison.headline)


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
    environment.globals.update(picture=_picture, pieces=text_spans, mark=mark_of)
    template = environment.from_string(resources.files("dpo_mm.evaluation").joinpath("report.html").read_text("utf-8"))
    percent = is_rate(report.headline)
    rows = rows_of(report.comparisons)
    return template.render(
        report=report,
        tone=TONES.get(report.verdict, "none"),
        rows=rows,
        unit=report.unit,
        won=f"{report.headline.win_rate:.0%}",
        headline=next(row for row in rows if row.headline),
        categories=rows_of(report.categories, percent),
        control=rows_of((report.control,), percent)[0] if report.control else None,
        scales=rows_of([comparison for _, comparison in report.scales], percent),
        sweep=Markup(scale_chart(report.scales, percent)),  # drawn here, with no text from outside
        pareto=Markup(pareto_chart(report.points, percent)),
        points=_points(report.points, percent),
        advice=advice(report.points),
        rule=RULE,
        level=LEVEL,
        charts=[(chart.title, Markup(chart.svg)) for chart in history_charts(report.history)],
        exact=exact(report.examples),
    )


def _points(points: Sequence[SweepPoint], percent: bool) -> list[tuple[SweepPoint, Row, Row | None]]:
    """Each point with its row of the headline's judge and of the guard's."""
    heads = rows_of([point.headline for point in points], percent)
    guards: list[Row | None] = [*rows_of([point.guard for point in points if point.guard])]
    return list(zip(points, heads, guards or [None] * len(points), strict=True))


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
        "points": [_point(point) for point in report.points],
        "control": report.control.as_dict() if report.control else None,
        "settings": report.settings,
        "notes": list(report.notes),
        "history": [{k: float(v) if math.isfinite(v) else None for k, v in entry.items()} for entry in report.history],
    }


def _point(point: SweepPoint) -> dict[str, Any]:
    guard = point.guard.as_dict() if point.guard else None
    return {
        "name": point.name,
        "scale": float(point.scale),
        "step": point.step,
        "headline": point.headline.as_dict(),
        "guard": guard,
        "on_front": point.on_front,
        "recommended": point.recommended,
    }


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """Write aside, then rename: the file is the old one or the new one, never half of it."""
    with atomic_write(path) as beside, beside.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def _picture(image: Image.Image) -> dict[str, Any]:
    """Attributes of an <img>: src, a PNG data URI; width and height in pixels; whether to enlarge without smoothing."""
    small = rgb(image)
    small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"src": source, "width": small.width, "height": small.height, "pixelated": max(small.size) < PIXELATED}
