"""Comparisons as rows of a table: on the page, in the terminal.

A comparison is shown in per cent where its metric's name has one of the words of `RATES` and its values are within
[0, 1]; metrics.json always holds fractions. Categories, LoRA scales and the control are shown as the headline is.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_mm.evaluation.image_statistics import IMAGE_STATISTICS
from dpo_mm.evaluation.statistics import Comparison

if TYPE_CHECKING:
    from rich.table import Table

RATES = re.compile(r"\b(rates?|right|share|accuracy|precision|recall|F1|CHAIR_[is])\b", re.IGNORECASE)
GROUPS = {("base", "tuned"): "", ("base", "sft"): "SFT on the chosen side", ("sft", "tuned"): "DPO against SFT"}
"""Heading of the rows of each pair of models."""
TONES = {"better": "good", "worse": "bad", "over-optimised": "warn"}


@dataclass(frozen=True)
class Row:
    """A comparison as words, and its interval on a track with 0 in the middle: left, width and dot in per cent.

    tests: p of the sign test, and corrected by Holm where it stands beside others. detectable: the smallest true
    difference that would be found. built_training_pairs: the judge made the training pairs.
    """

    metric: str
    judge: str
    group: str
    headline: bool
    base: str
    tuned: str
    difference: str
    interval: str
    verdict: str
    tone: str
    votes: str
    tests: str
    detectable: str
    built_training_pairs: bool
    n: int
    clusters: int
    left: float
    width: float
    dot: float


def terminal_table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons as a table for the end of a command."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", border_style="dim")
    for name in ("metric", "base", "tuned", "difference", "95 % interval", "verdict"):
        table.add_column(name, justify="left" if name in ("metric", "verdict") else "right")
    for heading, group in itertools.groupby(rows_of(comparisons), lambda row: row.group):
        if heading:
            table.add_row(Text(heading, style="italic"))
        for row in group:
            metric = Text(row.metric, style="bold" if row.headline else "")
            tone = {"good": "green", "bad": "red"}.get(row.tone, "dim")
            table.add_row(metric, row.base, row.tuned, row.difference, row.interval, Text(row.verdict, tone))
    return table


def is_rate(comparison: Comparison) -> bool:
    """Whether to show it in per cent: a word of `RATES` in the metric's name, and values within [0, 1]."""
    return all(0 <= value <= 1 for value in (comparison.base, comparison.tuned)) and bool(
        RATES.search(comparison.metric)
    )


def rows_of(comparisons: Sequence[Comparison], percent: bool | None = None) -> list[Row]:
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
        group=GROUPS[one.models],
        headline=one.headline,
        base=_plain(one.base, percent, places),
        tuned=_plain(one.tuned, percent, places),
        difference=_signed(one.difference, percent, places) + (" pts" if percent else ""),
        interval=f"{low} to {high}",
        verdict=one.verdict,
        tone=TONES.get(one.verdict, "none"),
        votes="" if one.judge == IMAGE_STATISTICS else f"{one.wins} better, {one.ties} same, {one.losses} worse",
        tests="" if one.p_holm is None else f"sign test p {one.p:.2g}, {one.p_holm:.2g} after Holm",
        detectable=_signed(one.detectable, percent, places).lstrip("+") + (" pts" if percent else "")
        if one.detectable
        else "",
        built_training_pairs=one.built_training_pairs,
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
