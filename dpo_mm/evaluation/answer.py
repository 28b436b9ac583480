"""First lines of a report: is the tuned model better, by how much, how sure is it, and at what price?"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_mm.evaluation.image_statistics import IMAGE_STATISTICS
from dpo_mm.evaluation.statistics import BASE_AND_TUNED, Comparison
from dpo_mm.evaluation.tables import rows_of

SHORT_ANSWERS = {
    "better": "Yes, the tuned model is better.",
    "worse": "No, the tuned model is worse.",
    "no evidence": "There is no evidence that the tuned model is better.",
    "differs": "The models differ, but this metric has no better direction.",
    "over-optimised": "The primary metric is better, but a guardrail metric is worse.",
    "better here, worse elsewhere": "The tuned model is better here, but worse on a side set.",
}
"""Answer to each verdict, see `verdict.Overall`."""


@dataclass(frozen=True)
class Answer:
    """First lines of a report, one or two sentences each.

    Args:
        short: whether it is better.
        change: by how much.
        certainty: how sure that is.
        price: what got worse, and how long the training was.
    """

    short: str
    change: str
    certainty: str
    price: str


def answer(
    comparisons: Sequence[Comparison], verdict: str, *, unit: str, history: Sequence[dict[str, float]] = ()
) -> Answer:
    """Sum up a comparison for its first lines.

    Args:
        comparisons: exactly one is the primary metric.
        verdict: verdict on the run.
        unit: what has one vote, in the plural: prompts, questions or images.
        history: the trainer's log.
    """
    primary = next(comparison for comparison in comparisons if comparison.headline)
    (row,) = rows_of([primary])
    metric = row.metric[:1].upper() + row.metric[1:]
    moved = "did not change from" if not primary.difference else "rose from" if primary.difference > 0 else "fell from"
    change = f"{metric} {moved} {row.base} to {row.tuned}: {row.difference}."
    if not primary.difference:
        change = f"{metric} {moved} {row.base}."
    interval = "too few items differ for an interval" if primary.low is None else f"95 % interval {row.interval}"
    holm = "" if primary.p_holm is None else f", after Holm's correction {_p(primary.p_holm)}"
    certainty = (
        f"{interval[:1].upper()}{interval[1:]}. Of {primary.clusters:,} {unit}, {primary.wins:,} improved, "
        f"{primary.losses:,} got worse and {primary.ties:,} did not change (sign test {_p(primary.p)}{holm})."
    )
    short = SHORT_ANSWERS.get(verdict, f"Verdict: {verdict}.")
    sentences = (change, certainty, _price(comparisons, history))
    return Answer(short, *(sentence.replace(" %", "\N{NO-BREAK SPACE}%") for sentence in sentences))


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _price(comparisons: Sequence[Comparison], history: Sequence[dict[str, float]]) -> str:
    """Name the other metrics that got significantly worse, and the number of training steps."""
    others = [one for one in comparisons if not one.headline and one.models == BASE_AND_TUNED]
    judged = [one for one in others if one.judge != IMAGE_STATISTICS]
    worse = [one for one in judged if one.verdict == "worse"]
    rows = zip(worse, rows_of(worse), strict=True)
    if worse:
        text = "Significantly worse: " + ", ".join(f"{one.name} ({row.base} to {row.tuned})" for one, row in rows) + "."
    else:
        text = "No other metric got significantly worse." if judged else "No other metric was measured."
    steps = max((int(entry["step"]) for entry in history if "step" in entry), default=0)
    return f"{text} Training took {steps:,} {'step' if steps == 1 else 'steps'}." if steps else text


def provenance_line() -> str:
    """Return date, versions and hardware of this moment as one line."""
    import torch

    from dpo_mm import __version__

    now = datetime.datetime.now(datetime.UTC)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = ", ".join(sorted(set(gpus))) or f"{cores} CPU cores"
    versions = f"dpo-mm {__version__}, torch {importlib.metadata.version('torch')}"
    return f"{now:%Y-%m-%d %H:%M} UTC, {versions}, {hardware}"
