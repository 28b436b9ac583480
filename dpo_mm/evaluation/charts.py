"""Charts of a report, as SVG to be put into the page: they take the page's font and its colours, light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.sweep import SweepPoint
from dpo_mm.evaluation.tables import is_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = {"quiet": "#010102", "line": "#010103", "base": "#010104", "tuned": "#010105"}
"""Stand-ins that the drawing is done in; each becomes the page's own colour of that name."""
CROWDED = 60  # points; a longer line is drawn faint, with its moving average on it


@dataclass(frozen=True)
class Panel:
    """A chart of the history: (name in the log, label) of each line, and a value with its meaning to compare with."""

    title: str
    lines: tuple[tuple[str, str], ...]
    guide: float
    meaning: str


PANELS = (
    Panel("Loss", (("loss", "training"), ("eval_loss", "held out")), math.log(2), "ln 2, where it starts"),
    Panel(
        "Implicit accuracy",
        (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out")),
        0.5,
        "chance",
    ),
    Panel(
        "Margin of chosen over rejected",
        (("rewards/margins", "training"), ("eval_rewards/margins", "held out")),
        0.0,
        "none",
    ),
    Panel("Implicit reward", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), 0.0, "the reference"),
    Panel("Denoising error", (("errors/chosen", "chosen"), ("errors/rejected", "rejected")), 1.0, "the reference"),
)


BY_NOISE = (
    ("eval_rewards/accuracies", "Implicit accuracy by noise", 0.5),
    ("eval_rewards/margins", "Margin by noise", 0.0),
)
"""What evaluations split by quarter of the noise schedule: name in the log, title, value where nothing was learned."""


@dataclass(frozen=True)
class Chart:
    """A panel's title and its drawing, one <svg> element with no text from outside."""

    title: str
    svg: str


def history_charts(history: Sequence[dict[str, float]]) -> list[Chart]:
    """A chart for each panel that the trainer's log has two points of; values that are not finite are left out.

    Of an image generator, also what the last evaluation found in each quarter of the noise schedule.
    """
    return [*_drawn(history), *_by_noise(history)]


def scale_chart(scales: Sequence[tuple[float, Comparison]], percent: bool) -> str:
    """The tuned score at each LoRA scale with the interval of its difference from the base; empty below two scales."""
    if len(scales) < 2:
        return ""
    figure, axes = _blank(width=4.8)
    factor = 100 if percent else 1
    ordered = sorted(scales, key=lambda pair: pair[0])
    x = [scale for scale, _ in ordered]
    tuned, base, low, high = (
        [factor * value for value in column]
        for column in zip(*((c.tuned, c.base, c.base + c.low, c.base + c.high) for _, c in ordered), strict=True)
    )
    axes.fill_between(x, low, high, color=INK["tuned"], alpha=0.14, linewidth=0)
    axes.plot(x, base, color=INK["base"], linewidth=1.4, label="base, same seeds")
    axes.plot(x, tuned, color=INK["tuned"], linewidth=1.8, marker="o", markersize=4.5, label="tuned, 95 % interval")
    axes.set_xticks(x)
    if percent:
        axes.yaxis.set_major_formatter("{x:g} %")
    return _svg(figure, f"Score at LoRA scales {', '.join(f'{scale:g}' for scale in x)}")


def pareto_chart(points: Sequence[SweepPoint], percent: bool) -> str:
    """The points on two axes, headline's judge and guard's, with the front and the recommended one; empty without a guard."""
    both = [(point, point.headline, point.guard) for point in points if point.guard is not None]
    if len(both) < 2:
        return ""
    figure, axes = _blank(width=4.8, height=3.4)
    across, up = 100 if percent else 1, 100 if all(guard and is_rate(guard) for *_, guard in both) else 1
    place = {id(point): (across * head.tuned, up * guard.tuned) for point, head, guard in both if guard is not None}
    front = sorted(place[id(point)] for point, *_ in both if point.on_front)
    axes.plot(*zip(*front, strict=True), color=INK["tuned"], linewidth=1.2, alpha=0.5, label="front")
    for point, *_ in both:
        x, y = place[id(point)]
        ink = INK["base"] if point.scale == 0 else INK["tuned"]
        axes.plot(x, y, "o", color=ink, markersize=7 if point.recommended else 4.5)
        if point.recommended:
            axes.plot(x, y, "o", color="none", markeredgecolor=ink, markersize=13, label="recommended")
        name = "base" if point.scale == 0 else point.name
        axes.annotate(name, (x, y), (8, 5), textcoords="offset points", fontsize=8.5, color=INK["quiet"])
    axes.margins(0.16)
    axes.grid(axis="x", color=INK["line"], linewidth=0.7)
    axes.set_xlabel(f"headline{', %' if across == 100 else ''}", fontsize=8.5, color=INK["quiet"])
    axes.set_ylabel(f"guard{', %' if up == 100 else ''}", fontsize=8.5, color=INK["quiet"])
    return _svg(figure, "Headline across, guard up, at each strength of the adapter")


def _drawn(history: Sequence[dict[str, float]]) -> Iterator[Chart]:
    for panel in PANELS:
        lines = [(label, *_points(history, name)) for name, label in panel.lines]
        lines = [line for line in lines if len(line[1]) > 1]
        if not lines:
            continue
        figure, axes = _blank()
        axes.axhline(panel.guide, color=INK["quiet"], linewidth=0.9, linestyle=(0, (1.5, 2.5)), label=panel.meaning)
        for (label, x, y), ink in zip(lines, ("tuned", "base"), strict=False):
            _line(axes, x, y, INK[ink], label)
        label = f"{panel.title} over training steps, last {lines[0][2][-1]:.3g}"
        yield Chart(panel.title, _svg(figure, label))


def _by_noise(history: Sequence[dict[str, float]]) -> Iterator[Chart]:
    """Held-out accuracy and margin of the last evaluation, a bar for each quarter of the noise schedule."""
    for name, title, guide in BY_NOISE:
        keys = [f"{name}_quartile{n}" for n in range(1, 5)]
        last = next((entry for entry in reversed(history) if all(key in entry for key in keys)), None)
        if last is None or not all(math.isfinite(last[key]) for key in keys):
            continue
        figure, axes = _blank()
        axes.axhline(guide, color=INK["quiet"], linewidth=0.9, linestyle=(0, (1.5, 2.5)), label="none learned")
        axes.bar(
            range(4),
            [last[key] - guide for key in keys],
            bottom=guide,
            width=0.55,
            color=INK["tuned"],
            label="held out",
        )
        axes.set_xticks(range(4), ["cleanest", "", "", "noisiest"])
        values = ", ".join(f"{last[key]:.3g}" for key in keys)
        yield Chart(title, _svg(figure, f"{title}, from the cleanest quarter to the noisiest: {values}"))


def _points(history: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what the log has of a name, (points,) each."""
    found = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
    both = np.array([pair for pair in found if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    if len(x) <= CROWDED:
        axes.plot(x, y, color=colour, linewidth=1.7, label=label)
        return
    width = len(x) // 20
    mean = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.28)
    axes.plot(x[width // 2 :][: len(mean)], mean, color=colour, linewidth=1.7, label=label)


def _blank(width: float = 4.2, height: float = 2.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK["line"])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK["quiet"], pad=5)
    axes.grid(axis="y", color=INK["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    axes.locator_params(axis="y", nbins=5)
    axes.ticklabel_format(axis="y", useOffset=False)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as one <svg> element: no declarations, no style of its own, no ids but those that it uses."""
    import matplotlib

    look = {"frameon": False, "fontsize": 8.5, "labelcolor": INK["quiet"], "handlelength": 1.4}
    space = {"columnspacing": 1.2, "handletextpad": 0.5, "borderpad": 0.1}
    figure.legend(loc="outside upper left", ncols=3, **look, **space)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+(?:\.[a-z]+)*_\d+"', "", text)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", text)
    for name, stand_in in INK.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
