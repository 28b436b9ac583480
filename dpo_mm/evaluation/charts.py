"""Charts of a report as inline SVG, in the page's font and its light and dark colours."""

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
"""Placeholder colours for matplotlib. Each is replaced by the page's colour of that name."""
MAX_PLAIN_POINTS = 60  # a line with more points is drawn faint, with its moving average over it


@dataclass(frozen=True)
class Panel:
    """Chart of the training log.

    Args:
        title: heading.
        unit: title of the vertical axis.
        lines: (name in the log, label) of each line.
        guide: value of the dotted line.
        meaning: label of the dotted line.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    guide: float
    meaning: str


PANELS = (
    Panel("Loss", "nats", (("loss", "training"), ("eval_loss", "evaluation")), math.log(2), "ln 2, the initial loss"),
    Panel(
        "Implicit accuracy",
        "fraction of pairs",
        (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "evaluation")),
        0.5,
        "chance",
    ),
    Panel(
        "Reward margin, chosen minus rejected",
        "nats",
        (("rewards/margins", "training"), ("eval_rewards/margins", "evaluation")),
        0.0,
        "no margin",
    ),
    Panel(
        "Implicit reward",
        "nats",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        0.0,
        "the reference",
    ),
    Panel(
        "Denoising error",
        "times the reference's",
        (("errors/chosen", "chosen"), ("errors/rejected", "rejected")),
        1.0,
        "the reference",
    ),
)


BY_NOISE = (
    ("eval_rewards/accuracies", "Implicit accuracy by noise", "fraction of pairs", 0.5),
    ("eval_rewards/margins", "Reward margin by noise", "nats", 0.0),
)
"""Metrics that the log splits by noise quartile: name in the log, title, unit, value of an untrained model."""


@dataclass(frozen=True)
class Chart:
    """Title and SVG of a chart: one <svg> element without text from outside."""

    title: str
    svg: str


def history_charts(history: Sequence[dict[str, float]]) -> list[Chart]:
    """Draw a chart for each panel that has at least two points in the trainer's log.

    Values that are not finite are left out. For image models, the last evaluation is also drawn by noise quartile.
    """
    return [*_panel_charts(history), *_noise_charts(history)]


def scale_chart(scales: Sequence[tuple[float, Comparison]], percent: bool) -> str:
    """Draw the tuned score and its interval at each LoRA scale. Empty below two scales."""
    if len(scales) < 2:
        return ""
    figure, axes = empty_figure(width=4.8, x="LoRA scale", y="primary metric")
    factor = 100 if percent else 1
    ordered = sorted(scales, key=lambda pair: pair[0])
    x = [scale for scale, _ in ordered]
    tuned, base = [factor * c.tuned for _, c in ordered], [factor * c.base for _, c in ordered]
    low, high = (
        [
            value if end is None else factor * (c.base + end)
            for value, end, (_, c) in zip(tuned, ends, ordered, strict=True)
        ]
        for ends in ([c.low for _, c in ordered], [c.high for _, c in ordered])
    )
    axes.fill_between(x, low, high, color=INK["tuned"], alpha=0.14, linewidth=0)
    axes.plot(x, base, color=INK["base"], linewidth=1.4, label="base, same seeds")
    axes.plot(x, tuned, color=INK["tuned"], linewidth=1.8, marker="o", markersize=4.5, label="tuned, 95 % interval")
    axes.set_xticks(x)
    if percent:
        axes.yaxis.set_major_formatter("{x:g} %")
    return to_svg(figure, f"Score at LoRA scales {', '.join(f'{scale:g}' for scale in x)}")


def pareto_chart(points: Sequence[SweepPoint], percent: bool) -> str:
    """Draw the points by primary and guardrail score, with the Pareto front. Empty without a guardrail."""
    guarded = [(point, point.headline, point.guard) for point in points if point.guard is not None]
    if len(guarded) < 2:
        return ""
    x_factor, y_factor = 100 if percent else 1, 100 if all(is_rate(guard) for *_, guard in guarded) else 1
    unit = lambda factor: ", %" if factor == 100 else ""
    figure, axes = empty_figure(
        width=4.8, height=3.4, x=f"primary metric{unit(x_factor)}", y=f"guardrail metric{unit(y_factor)}"
    )
    positions = [(x_factor * primary.tuned, y_factor * guard.tuned) for _, primary, guard in guarded]
    front = sorted(position for position, (point, *_) in zip(positions, guarded, strict=True) if point.on_front)
    axes.plot(*zip(*front, strict=True), color=INK["tuned"], linewidth=1.2, alpha=0.5, label="Pareto front")
    for (x, y), (point, *_) in zip(positions, guarded, strict=True):
        ink = INK["base"] if point.scale == 0 else INK["tuned"]
        axes.plot(x, y, "o", color=ink, markersize=7 if point.recommended else 4.5)
        if point.recommended:
            axes.plot(x, y, "o", color="none", markeredgecolor=ink, markersize=13, label="recommended")
        name = "base" if point.scale == 0 else point.name
        axes.annotate(name, (x, y), (8, 5), textcoords="offset points", fontsize=8.5, color=INK["quiet"])
    axes.margins(0.16)
    axes.grid(axis="x", color=INK["line"], linewidth=0.7)
    return to_svg(figure, "Primary metric and guardrail at each strength of the adapter")


def _panel_charts(history: Sequence[dict[str, float]]) -> Iterator[Chart]:
    for panel in PANELS:
        lines = [(label, *_points(history, name)) for name, label in panel.lines]
        lines = [line for line in lines if len(line[1]) > 1]
        if not lines:
            continue
        figure, axes = empty_figure(x="optimizer step", y=panel.unit)
        axes.axhline(panel.guide, color=INK["quiet"], linewidth=0.9, linestyle=(0, (1.5, 2.5)), label=panel.meaning)
        for (label, x, y), ink in zip(lines, ("tuned", "base"), strict=False):
            _plot_line(axes, x, y, INK[ink], label)
        label = f"{panel.title} over training steps, last {lines[0][2][-1]:.3g}"
        yield Chart(panel.title, to_svg(figure, label))


def _noise_charts(history: Sequence[dict[str, float]]) -> Iterator[Chart]:
    """Draw accuracy and margin of the last evaluation, one bar per noise quartile."""
    for name, title, unit, guide in BY_NOISE:
        keys = [f"{name}_quartile{n}" for n in range(1, 5)]
        last = next((entry for entry in reversed(history) if all(key in entry for key in keys)), None)
        if last is None or not all(math.isfinite(last[key]) for key in keys):
            continue
        figure, axes = empty_figure(x="noise of the timestep, by quartile", y=unit)
        axes.axhline(guide, color=INK["quiet"], linewidth=0.9, linestyle=(0, (1.5, 2.5)), label="untrained")
        axes.bar(
            range(4),
            [last[key] - guide for key in keys],
            bottom=guide,
            width=0.55,
            color=INK["tuned"],
            label="evaluation",
        )
        axes.set_xticks(range(4), ["least noisy", "", "", "noisiest"])
        values = ", ".join(f"{last[key]:.3g}" for key in keys)
        yield Chart(title, to_svg(figure, f"{title}, from the least noisy quartile to the noisiest: {values}"))


def _points(history: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of a name in the log, (points,) each."""
    entries = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
    points = np.array([entry for entry in entries if math.isfinite(entry[1])], dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _plot_line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """Plot a line, with its moving average if it has many points."""
    if len(x) <= MAX_PLAIN_POINTS:
        axes.plot(x, y, color=colour, linewidth=1.7, label=label)
        return
    width = len(x) // 20
    mean = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.28)
    axes.plot(x[width // 2 :][: len(mean)], mean, color=colour, linewidth=1.7, label=label)


def empty_figure(*, x: str, y: str, width: float = 4.2, height: float = 2.6) -> tuple[Figure, Axes]:
    """Create a figure with empty axes in the report's style.

    Args:
        x, y: titles of the axes, with units. Empty: none.
        width, height: inches.
    """
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
    axes.set_xlabel(x, fontsize=8.5, color=INK["quiet"])
    axes.set_ylabel(y, fontsize=8.5, color=INK["quiet"])
    return figure, axes


def to_svg(figure: Figure, label: str) -> str:
    """Convert a figure to one <svg> element without declarations, styles or unused ids."""
    import matplotlib

    style = {"frameon": False, "fontsize": 8.5, "labelcolor": INK["quiet"], "handlelength": 1.4}
    spacing = {"columnspacing": 1.2, "handletextpad": 0.5, "borderpad": 0.1}
    figure.legend(loc="outside upper left", ncols=3, **style, **spacing)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+(?:\.[a-z]+)*_\d+"', "", text)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", text)
    for name, placeholder in INK.items():
        text = text.replace(placeholder, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
