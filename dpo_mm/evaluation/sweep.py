"""Strength of the adapter: LoRA scales and checkpoints by two judges, and the recommended one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_mm.evaluation.statistics import Comparison, holm_corrected

RULE = (
    "The rule: the best primary score among the Pareto-optimal points whose guardrail is not significantly worse than "
    "the base. It must be significantly better than the base. Ties go to the weaker setting."
)


@dataclass(frozen=True)
class SweepPoint:
    """One strength of the adapter, compared with the base.

    Args:
        name: label in the report.
        scale: LoRA scale. 0 is the base.
        step: optimizer step of the checkpoint. None for the final adapter.
        headline: comparison by the primary metric.
        guard: comparison by the guardrail metric. None if there is none.
        on_front: whether the point is Pareto-optimal.
        recommended: whether the rule picks it.
    """

    name: str
    scale: float
    step: int | None
    headline: Comparison
    guard: Comparison | None
    on_front: bool = False
    recommended: bool = False


def correct_points(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the points with the p of each metric corrected for the number of points other than the base."""
    tuned = [point for point in points if point.scale != 0]
    primary = iter(holm_corrected([point.headline for point in tuned]))
    guards = iter(holm_corrected([point.guard for point in tuned if point.guard]))
    return [
        dataclasses.replace(point, headline=next(primary), guard=next(guards) if point.guard else None)
        if point.scale != 0
        else point
        for point in points
    ]


def mark_recommended(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """Return the points with the Pareto front and the recommended point marked, by `RULE`."""
    front = [point for point in points if not any(_dominates(other, point) for other in points)]
    candidates = [
        point
        for point in front
        if point.headline.verdict == "better" and (point.guard is None or point.guard.verdict != "worse")
    ]
    preference = lambda point: (_score(point.headline), -point.scale, -(point.step or float("inf")))
    best = max(candidates, key=preference) if candidates else None
    return tuple(dataclasses.replace(point, on_front=point in front, recommended=point is best) for point in points)


def _dominates(other: SweepPoint, point: SweepPoint) -> bool:
    """Return whether `other` is at least as good by both judges and better by one."""
    scores, other_scores = (
        [_score(comparison) for comparison in (each.headline, each.guard) if comparison is not None]
        for each in (point, other)
    )
    return all(a >= b for a, b in zip(other_scores, scores, strict=True)) and other_scores != scores


def _score(comparison: Comparison) -> float:
    """Return the tuned score, higher is better."""
    return -comparison.tuned if comparison.direction == "lower" else comparison.tuned


def advice(points: Sequence[SweepPoint]) -> str:
    """Write the recommendation for the report."""
    best = next((point for point in points if point.recommended), None)
    if best is None:
        return (
            "No strength of the adapter is recommended: none is significantly better than the base without a "
            "significantly worse guardrail."
        )
    return (
        f"Recommended: {best.name}. It was selected on these images, so its gain is optimistic. "
        "Confirm it with another seed."
    )
