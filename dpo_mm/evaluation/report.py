"""Report of a comparison: report.html, metrics.json and contact_sheet.png.

The page is one file. Images are PNG data URIs, charts are inline SVG in the page's own colours. There is no script, and
its content security policy forbids any. The template escapes everything from outside (prompts, texts, names, settings).
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from dpo_mm.evaluation.answer import answer
from dpo_mm.evaluation.charts import Chart, history_charts, pareto_chart, scale_chart
from dpo_mm.evaluation.contact_sheet import (
    PIXELATED,
    Example,
    MostChanged,
    contact_sheet,
    has_exact_scores,
    mark_of,
    rgb,
)
from dpo_mm.evaluation.marked_text import TextExample, text_spans, transcription_spans
from dpo_mm.evaluation.round_charts import RoundPoint, round_charts, rounds_json
from dpo_mm.evaluation.significance import LEVEL
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.sweep import RULE, SweepPoint, advice
from dpo_mm.evaluation.tables import TONES, Row, is_rate, rows_of, terminal_table
from dpo_mm.files.resumable import atomic_write

if TYPE_CHECKING:
    import jinja2

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

MAX_EDGE = 768  # pixels; larger images are shrunk to this edge for the page
WEBP_QUALITY = 90  # of photographs: a fifth of the bytes of PNG


NO_CHANGES = MostChanged()


@dataclass(frozen=True)
class Report:
    """Contents of a report.

    Args:
        title, verdict, command: heading, verdict in a word, and how to repeat it.
        summary: result in a sentence, for metrics.json alone.
        comparisons: one per judge and pair of models. Exactly one is the primary metric (`headline`).
        categories: comparisons by the primary judge within each category. `metric` is the category's name.
        scales: LoRA scale and the comparison of the base with the adapter at that scale.
        points: scales and checkpoints, each compared by the primary and the guardrail metric.
        control: comparison of the base with itself under other seeds.
        history: the trainer's log entries, each with "step" and any of the names in `charts.PANELS`.
        examples, text_examples: images and responses to show.
        most_changed: images that the first screen shows.
        provenance: date, versions and hardware, for report.html alone.
        settings: name and value of each setting of the run.
        notes: caveats, a sentence or two each.
        unit: the random sample, in the plural: prompts, questions or images.
        rounds, best_round: rounds of a recipe, and the number of the one to keep, 0 for the base.

    Raises:
        ValueError: unless exactly one comparison is the primary metric.
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
    most_changed: MostChanged = NO_CHANGES
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = "prompts"
    rounds: tuple[RoundPoint, ...] = ()
    best_round: int = 0
    provenance: str = ""

    def __post_init__(self) -> None:
        primary = [comparison.metric for comparison in self.comparisons if comparison.headline]
        if len(primary) != 1:
            raise ValueError(f"{len(primary)} primary metrics {primary}: mark exactly one with headline=True")

    @property
    def headline(self) -> Comparison:
        """Comparison by the primary metric."""
        return next(comparison for comparison in self.comparisons if comparison.headline)


def write_report(folder: Path, report: Report) -> Path:
    """Write report.html, metrics.json and, if there are image examples, contact_sheet.png.

    Each file is written atomically: after a failure the old file is unchanged.

    Args:
        folder: created if it does not exist.
        report: its contents.

    Returns:
        Path of report.html.

    Raises:
        ValueError: if a mark lies outside its text.
        OSError: if a file cannot be written.
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


@functools.cache
def page_template() -> jinja2.Template:
    """Template of the page. Compiling it takes longer than rendering it."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        img_attributes=_img_attributes, text_spans=text_spans, transcription_spans=transcription_spans, mark_of=mark_of
    )
    return environment.from_string(resources.files("dpo_mm.evaluation").joinpath("report.html").read_text("utf-8"))


def render(report: Report) -> str:
    """Render the page as HTML, with everything inlined and escaped.

    Raises:
        ValueError: if a mark lies outside its text.
    """
    from markupsafe import Markup

    percent = is_rate(report.headline)
    rows = rows_of(report.comparisons)
    return page_template().render(
        report=report,
        tone=TONES.get(report.verdict, "none"),
        answer=answer(report.comparisons, report.verdict, unit=report.unit, history=report.history),
        rows=rows,
        unit=report.unit,
        headings=_headings(report),
        win_rate=f"{100 * report.headline.win_rate:.0f} %",
        primary=next(row for row in rows if row.headline),
        categories=rows_of(report.categories, percent),
        control=rows_of((report.control,), percent)[0] if report.control else None,
        scales=rows_of([comparison for _, comparison in report.scales], percent),
        scale_chart=Markup(scale_chart(report.scales, percent)),  # safe: an SVG without text from outside
        pareto_chart=Markup(pareto_chart(report.points, percent)),
        points=_points(report.points, percent),
        advice=advice(report.points),
        rule=RULE,
        level=LEVEL,
        charts=[(chart.title, Markup(chart.svg)) for chart in history_charts(report.history)],
        rounds=list(zip(report.rounds, rows_of([point.headline for point in report.rounds], percent), strict=True)),
        round_charts=[(chart.title, Markup(chart.svg)) for chart in _round_charts(report)],
        exact=has_exact_scores((*report.examples, *report.most_changed.all)),
    )


def _headings(report: Report) -> list[tuple[str, Sequence[Example]]]:
    """Return headings and images of the first screen."""
    names = (
        ("Rose most", "Fell most") if report.headline.direction == "neutral" else ("Improved most", "Got worse most")
    )
    return list(zip(names, (report.most_changed.improved, report.most_changed.worsened), strict=True))


def _round_charts(report: Report) -> list[Chart]:
    """Draw the rounds. The report's comparison is the last one only if a round passed."""
    return round_charts(report.rounds, report.headline if report.best_round else None, report.best_round)


def _points(points: Sequence[SweepPoint], percent: bool) -> list[tuple[SweepPoint, Row, Row | None]]:
    """Return each point with its rows of the primary and the guardrail metric."""
    primary = rows_of([point.headline for point in points], percent)
    guards: list[Row | None] = [*rows_of([point.guard for point in points if point.guard])]
    return list(zip(points, primary, guards or [None] * len(points), strict=True))


def _metrics(report: Report) -> dict[str, Any]:
    """Return the contents of metrics.json. Numbers that are not finite (a skipped step's loss) become null."""
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
        **({"best_round": report.best_round, "rounds": rounds_json(report.rounds)} if report.rounds else {}),
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
    """Write a file atomically: it is the old or the new one, never an incomplete one."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def _img_attributes(image: Image.Image) -> dict[str, Any]:
    """Return src (a data URI), width, height and whether to enlarge without smoothing, for an <img>.

    Small images are PNG. Photographs are WebP.
    """
    small = rgb(image)
    small.thumbnail((MAX_EDGE, MAX_EDGE))
    pixelated = max(small.size) < PIXELATED
    form, options = ("PNG", {"optimize": True}) if pixelated else ("WEBP", {"quality": WEBP_QUALITY})
    buffer = io.BytesIO()
    small.save(buffer, format=form, **options)
    source = f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"src": source, "width": small.width, "height": small.height, "pixelated": pixelated}
