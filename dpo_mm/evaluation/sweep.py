"""How strong the adapter should be: LoRA scales and checkpoints on two axes, and the point that a stated rule picks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_mm.evaluation.statistics import Comparison

RULE = (
    "Of the points that no other beats on both judges, and where the guard is not significantly worse than the base's, "
    "the one with the best headline, if it is significantly better than the base's; of equals the weaker one."
)


@dataclass(frozen=True)
class SweepPoint:
    """One strength of the adapter against the base, by the headline's judge and by the guard's (None without one).

    scale: of the LoRA, 0 is the base. step: of the checkpoint; None: what the training ended with.
    """

    name: str
    scale: float
    step: int | None
    headline: Comparison
    guard: Comparison | None
    on_front: bool = False
    recommended: bool = False


def mark_recommended(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """The points, those on the Pareto front and the recommended one marked; by RULE. Scores are better when higher."""
    front = [one for one in points if not any(_beats(other, one) for other in points)]
    fit = [
        one for one in front if one.headline.verdict == "better" and (one.guard is None or one.guard.verdict != "worse")
    ]
    strength = lambda one: (one.headline.tuned, -one.scale, -(one.step or float("inf")))
    best = max(fit, key=strength) if fit else None
    return tuple(dataclasses.replace(one, on_front=one in front, recommended=one is best) for one in points)


def _beats(other: SweepPoint, one: SweepPoint) -> bool:
    """Whether the other point is as good on both judges and better on one."""
    ours, theirs = (
        [judged.tuned for judged in (point.headline, point.guard) if judged is not None] for point in (one, other)
    )
    return all(a >= b for a, b in zip(theirs, ours, strict=True)) and theirs != ours


def advice(points: Sequence[SweepPoint]) -> str:
    """What the rule picks, in words."""
    best = next((point for point in points if point.recommended), None)
    if best is None:
        return (
            "No strength of the adapter is significantly better than the base without costing the guard: leave it off."
        )
    return f"Recommended: {best.name}. It was chosen on these pictures, so its gain is flattered: confirm it with another seed."
