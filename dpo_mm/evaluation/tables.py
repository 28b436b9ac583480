"""Comparisons as rows of a table, in the report and in the terminal.

A comparison is shown in per cent if the metric's name contains one of the words of `RATES` and both values are in
[0, 1]. metrics.json always contains fractions. Categories, LoRA scales and the control are shown like the primary
metric.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_mm.evaluation.image_statistics import IMAGE_STATISTICS
from dpo_mm.evaluation.statistics import BASE_AND_TUNED, Comparison
from dpo_mm.printing.printed_text import printable
from dpo_mm.process.process_rank import process_rank

if TYPE_CHECKING:
    from rich.table import Table

    from dpo_mm.evaluation.verdict import CompareResult

RATES = re.compile(
    r"\b(rates?|right|share|fraction|ratio|repetition|accuracy|precision|recall|F1|CHAIR_[is])\b", re.IGNORECASE
)
GROUPS = {
    BASE_AND_TUNED: ("", "Base", "Tuned"),
    ("base", "sft"): ("SFT on the chosen side", "Base", "SFT"),
    ("sft", "tuned"): ("DPO against SFT", "SFT", "DPO"),
}
"""Heading of the comparisons of two models, and the names of the two."""
JUDGE_NAMES = {IMAGE_STATISTICS: "image statistics", "pixels": "pixel distances"}
"""Text for comparisons that no judge made."""
TONES = {"better": "good", "worse": "bad", "over-optimised": "warn", "better here, worse elsewhere": "warn"}


@dataclass(frozen=True)
class Row:
    """A comparison as text, with its interval as a bar on a track that has 0 in the middle.

    Args:
        metric, judge, base, tuned, difference, interval, verdict: the comparison's values as text.
        headline: whether this is the primary metric.
        tone: name of the verdict's colour.
        votes: prompts that are better, the same and worse. Empty for image statistics.
        tests: p of the sign test and of Holm's correction. Empty if there is no correction.
        detectable: minimum detectable effect. Empty if it is unknown or rounds to 0.
        built_training_pairs: whether the judge also built the training pairs.
        n, clusters: number of items, and of prompts.
        left, width, dot: start and width of the bar and position of the difference, per cent of the track.
        group: heading of the two models that are compared. Empty for base and tuned.
        models: names of the two.
    """

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
    tests: str
    detectable: str
    built_training_pairs: bool
    n: int
    clusters: int
    left: float
    width: float
    dot: float
    group: str
    models: tuple[str, str]


def terminal_table(comparisons: Sequence[Comparison]) -> Table:
    """Build the table of comparisons that a command prints at its end."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", border_style="dim")
    for name in ("metric", "base", "tuned", "difference", "95 % interval", "verdict"):
        table.add_column(name, justify="left" if name in ("metric", "verdict") else "right")
    for group, rows in itertools.groupby(rows_of(comparisons), lambda row: (row.group, *row.models)):
        if group[0]:
            table.add_row(*(Text(words, style="italic") for words in group))
        for row in rows:
            metric = Text(row.metric, style="bold" if row.headline else "")
            tone = {"good": "green", "bad": "red"}.get(row.tone, "dim")
            table.add_row(metric, row.base, row.tuned, row.difference, row.interval, Text(row.verdict, tone))
    return table


def is_rate(comparison: Comparison) -> bool:
    """Return whether to show a comparison in per cent."""
    in_range = all(0 <= value <= 1 for value in (comparison.base, comparison.tuned))
    return in_range and bool(RATES.search(comparison.metric))


def rows_of(comparisons: Sequence[Comparison], percent: bool | None = None) -> list[Row]:
    """Format comparisons as rows of one table.

    Args:
        comparisons: one per row.
        percent: show all of them in per cent, or none. None decides for each by `is_rate`.

    Returns:
        The rows. All rates share the scale of their tracks, and so do all rows if `percent` is given. Any other metric
        has its own scale.
    """
    in_percent = [is_rate(comparison) if percent is None else percent for comparison in comparisons]
    own_reach = [max(abs(end) for end in (*_ends(c), 1e-9)) for c in comparisons]
    shares_scale = [rate or percent is not None for rate in in_percent]
    shared_reach = max(itertools.compress(own_reach, shares_scale), default=1.0)
    return [
        _row(comparison, rate, shared_reach if shares else reach)
        for comparison, rate, shares, reach in zip(comparisons, in_percent, shares_scale, own_reach, strict=True)
    ]


def _row(comparison: Comparison, percent: bool, reach: float) -> Row:
    """Format one comparison. reach: value at the ends of its track."""
    left, right, dot = (50 + 46 * value / reach for value in (*_ends(comparison), comparison.difference))
    digits = 1 if percent else _decimals(comparison)
    unit = " pts" if percent else ""
    low, high = (_signed(value, percent, digits) for value in _ends(comparison))
    interval = f"{low} to {high}" if comparison.low is not None else "too few"
    votes = f"{comparison.wins} better, {comparison.ties} same, {comparison.losses} worse"
    tests = (
        f"sign test p {comparison.p:.2g}, {comparison.p_holm:.2g} after Holm" if comparison.p_holm is not None else ""
    )
    mde = _signed(comparison.detectable or 0.0, percent, digits).lstrip("+")
    group, *models = GROUPS.get(comparison.models, (" and ".join(comparison.models), *comparison.models))
    group = f"Side set {comparison.side_set}" if comparison.side_set else group
    return Row(
        metric=comparison.metric,
        judge=JUDGE_NAMES.get(comparison.judge, comparison.judge),
        headline=comparison.headline,
        base=_plain(comparison.base, percent, digits),
        tuned=_plain(comparison.tuned, percent, digits),
        difference=_signed(comparison.difference, percent, digits) + unit,
        interval=interval,
        verdict=comparison.verdict,
        tone=TONES.get(comparison.verdict, "none"),
        votes="" if comparison.judge == IMAGE_STATISTICS else votes,
        tests=tests,
        detectable=mde + unit if float(mde) else "",
        built_training_pairs=comparison.built_training_pairs,
        n=comparison.n,
        clusters=comparison.clusters,
        left=round(left, 2),
        width=round(max(right - left, 0.6), 2),
        dot=round(dot, 2),
        group=group,
        models=(models[0], models[1]),
    )


def _ends(comparison: Comparison) -> tuple[float, float]:
    """Return the ends of the interval, or the difference twice if there is none."""
    if comparison.low is None or comparison.high is None:
        return comparison.difference, comparison.difference
    return comparison.low, comparison.high


def _decimals(comparison: Comparison) -> int:
    """Return the decimals that show two digits of the interval's width, two to six."""
    low, high = _ends(comparison)
    width = high - low or abs(comparison.difference)
    return min(max(1 - math.floor(math.log10(width)), 2), 6) if width > 0 else 3


def _plain(value: float, percent: bool, digits: int) -> str:
    return f"{100 * value:.{digits}f} %" if percent else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float, percent: bool, digits: int) -> str:
    rounded = round((100 if percent else 1) * value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def print_result(result: CompareResult) -> None:
    """Print a comparison's table, notes, verdict and path of the report, in the first process."""
    from rich.console import Console

    if not process_rank().is_first:
        return
    console = Console()
    console.print(terminal_table(result.comparisons))
    for note in result.notes:
        console.print(printable(note), markup=False, highlight=False)
    print(printable(f"Verdict: {result.verdict}\nReport: {result.report}"))
