"""Measures of the rounds of a recipe, and their figure: metric, log-probs, diversity and tokens by round."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_mm.evaluation.charts import INK, Chart, empty_figure, to_svg
from dpo_mm.evaluation.response_sampling import RESPONSES_FILE
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.tables import is_rate
from dpo_mm.files.json_lines import read_lines


class BeforeAfter(NamedTuple):
    """A value of the round before and of this round, on the same material."""

    before: float
    after: float


class LogProbChange(NamedTuple):
    """Mean change of the log-probs of a round's pairs since its start, nats (images: without a unit)."""

    chosen: float
    rejected: float


@dataclass(frozen=True)
class RoundPoint:
    """One round in the report.

    Args:
        number: of the round, from 1.
        headline: primary metric of the round before (as base) and of this round (as tuned).
        decision: why the rounds went further or stopped, a sentence without its full stop.
        passed: whether the round passed the test.
        level: significance level of its test.
        pairs: number of mined pairs.
        log_probs: change in training. None if the log has none.
        diversity: of images, their pairwise distance. Of responses, their distinct bigrams per bigram (distinct-2).
        tokens: tokens per response. None for images.

    Source: Li et al. 2016 (1510.03055), section 5.2, for distinct-2.
    """

    number: int
    headline: Comparison
    decision: str
    passed: bool
    level: float
    pairs: int
    log_probs: LogProbChange | None = None
    diversity: BeforeAfter | None = None
    tokens: BeforeAfter | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        changes = {name: getattr(self, name) for name in ("log_probs", "diversity", "tokens")}
        plain = {name: value._asdict() if value else None for name, value in changes.items()}
        rest = {name: getattr(self, name) for name in ("number", "decision", "passed", "level", "pairs")}
        return {**rest, **plain, "headline": self.headline.as_dict()}


def log_prob_change(history: Sequence[dict[str, float]], beta: float) -> LogProbChange | None:
    """Return the last change of log-probs in a training log, on held-out pairs if it has them.

    Args:
        history: the log.
        beta: of the run, 1/nats.
    """
    for start in ("eval_rewards", "rewards"):
        for entry in reversed(history):
            if f"{start}/chosen" in entry and f"{start}/rejected" in entry:
                return LogProbChange(entry[f"{start}/chosen"] / beta, entry[f"{start}/rejected"] / beta)
    return None


def distinct_bigrams(texts: Iterable[str]) -> float:
    """Return distinct word bigrams per word bigram of all texts (distinct-2), in [0, 1]. 0 without one."""
    counts: Counter[tuple[str, str]] = Counter()
    for text in texts:
        words = text.split()
        counts.update(itertools.pairwise(words))
    return len(counts) / max(counts.total(), 1)


def measure_responses(folder: Path) -> dict[str, BeforeAfter]:
    """Return diversity and tokens of the responses of a comparison. Empty for one of images."""
    rows = read_lines(folder / RESPONSES_FILE)
    models = [[row for row in rows if row["by"] == name] for name in ("base model", "tuned model")]
    if not all(models):
        return {}
    tokens = [float(np.mean([row["tokens"] for row in model])) for model in models]
    diversity = [distinct_bigrams(row["text"] for row in model) for model in models]
    return {"diversity": BeforeAfter(*diversity), "tokens": BeforeAfter(*tokens)}


def round_charts(points: Sequence[RoundPoint], last: Comparison | None, best_round: int) -> list[Chart]:
    """Draw metric, log-probs, diversity and tokens by round, each if it was measured.

    Args:
        points: the rounds.
        last: comparison of the base with the round to keep, on other material. None if there was none.
        best_round: its number.
    """
    return list(_charts(points, last, best_round))


def _charts(points: Sequence[RoundPoint], last: Comparison | None, best_round: int) -> Iterator[Chart]:
    if not points:
        return
    yield _metric_chart(points, last, best_round)
    changes = [(point.number, point.log_probs) for point in points if point.log_probs]
    if changes:
        figure, axes = empty_figure(x="", y="change, nats")
        axes.axhline(0, color=INK["quiet"], linewidth=0.9, linestyle=(0, (1.5, 2.5)), label="start of the round")
        for side, ink, shift in (("chosen", "tuned", -0.08), ("rejected", "base", 0.08)):
            x, y = [n + shift for n, _ in changes], [getattr(change, side) for _, change in changes]
            axes.vlines(x, 0, y, color=INK[ink], linewidth=1.2)
            axes.plot(x, y, "o", color=INK[ink], markersize=4.5, label=side)
        axes.set_xlim(0.5, points[-1].number + 0.5)
        _label_rounds(axes, [point.number for point in points])
        yield Chart("Log-prob of the round's pairs", to_svg(figure, "Change of log-probs in training, by round"))
    for name, title, unit in (
        ("diversity", "Diversity", "distance or fraction"),
        ("tokens", "Tokens per response", "tokens"),
    ):
        values = [(point.number, getattr(point, name)) for point in points if getattr(point, name)]
        if values:
            figure, axes = empty_figure(x="", y=unit)
            for number, value in values:
                _plot_step(axes, number, value.before, value.after, labels=number == values[0][0])
            _label_rounds(axes, range(points[-1].number + 1))
            yield Chart(title, to_svg(figure, f"{title} by round"))


def _metric_chart(points: Sequence[RoundPoint], last: Comparison | None, best_round: int) -> Chart:
    """Draw the primary metric of each round next to that of the round before, with the interval of the difference."""
    factor = 100 if all(is_rate(point.headline) for point in points) else 1
    figure, axes = empty_figure(x="", y="primary metric")
    for point in points:
        one = point.headline
        _plot_step(axes, point.number, factor * one.base, factor * one.tuned, labels=point is points[0])
        _plot_interval(axes, point.number, one, factor, "tuned")
    if last is not None:
        x = [0.0, best_round]
        values = [factor * last.base, factor * last.tuned]
        axes.plot(x, values, "s:", color=INK["quiet"], markersize=4, linewidth=1.2, label="last comparison")
        _plot_interval(axes, best_round + 0.08, last, factor, "quiet")
    _label_rounds(axes, range(points[-1].number + 1))
    if factor == 100:
        axes.yaxis.set_major_formatter("{x:g} %")
    after = ", ".join(f"{factor * point.headline.tuned:.3g}" for point in points)
    return Chart("Primary metric, 95 % interval", to_svg(figure, f"Primary metric after each round: {after}"))


def _plot_step(axes: Any, number: int, before: float, after: float, *, labels: bool) -> None:
    """Plot a line from the round before to this round. Both were measured on the same material."""
    axes.plot([number - 1, number], [before, after], color=INK["tuned"], linewidth=1.5)
    names = ("round before, same material", "round") if labels else (None, None)
    axes.plot([number - 1], [before], "o", color=INK["base"], markersize=5, label=names[0])
    axes.plot([number], [after], "o", color=INK["tuned"], markersize=5, label=names[1])


def _plot_interval(axes: Any, x: float, one: Comparison, factor: int, ink: str) -> None:
    """Plot the interval of the difference around the value of the round. A rate stays within 0 and 1."""
    if one.low is not None and one.high is not None:
        low, high = one.base + one.low, one.base + one.high
        if factor == 100:
            low, high = max(low, 0.0), min(high, 1.0)
        axes.vlines([x], factor * low, factor * high, color=INK[ink], linewidth=1.2)


def _label_rounds(axes: Any, numbers: Iterable[int]) -> None:
    ticks = list(numbers)
    axes.set_xticks(ticks, ["base" if number == 0 else f"round {number}" for number in ticks])


def rounds_json(points: Sequence[RoundPoint]) -> list[dict[str, Any]]:
    """Return the rounds for metrics.json, without numbers that are not finite."""
    rows: list[dict[str, Any]] = json.loads(json.dumps([point.as_dict() for point in points]))
    return rows
