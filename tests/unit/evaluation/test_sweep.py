"""The recommended strength: Pareto-optimal, significantly better, and without a significantly worse guardrail."""

from __future__ import annotations

import dataclasses

import pytest

from dpo_mm.evaluation.charts import pareto_chart
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.evaluation.sweep import SweepPoint, advice, mark_recommended


def judged(tuned: float, verdict: str = "no evidence", base: float = 0.5) -> Comparison:
    return Comparison(
        metric="right rate", judge="j", headline=False, base=base, tuned=tuned, difference=tuned - base, low=-0.1, high=0.1,
        n=9, verdict=verdict, wins=5, ties=2, losses=2, p=0.5, clusters=9,
    )  # fmt: skip


def point(
    name: str, scale: float, head: tuple[float, str], guard: tuple[float, str] | None, step: int | None = None
) -> SweepPoint:
    return SweepPoint(name, scale, step, judged(*head), None if guard is None else judged(*guard))


BASE = point("scale 0", 0.0, (0.5, "no evidence"), (0.5, "no evidence"))
HALF = point("scale 0.5", 0.5, (0.6, "better"), (0.55, "no evidence"))
WHOLE = point("scale 1", 1.0, (0.7, "better"), (0.45, "no evidence"))
STRONG = point("scale 1.5", 1.5, (0.8, "better"), (0.3, "worse"))
BEATEN = point("step 100", 1.0, (0.55, "better"), (0.4, "no evidence"), 100)


def best(*points: SweepPoint) -> str | None:
    return next((one.name for one in mark_recommended(points) if one.recommended), None)


def test_pareto_front_has_the_points_that_none_dominates() -> None:
    assert [one.on_front for one in mark_recommended((BASE, HALF, WHOLE, STRONG, BEATEN))] == [
        False,
        True,
        True,
        True,
        False,
    ]
    equal_points = mark_recommended((HALF, dataclasses.replace(HALF, name="copy")))
    assert [one.on_front for one in equal_points] == [True, True]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((BASE, HALF, WHOLE, STRONG, BEATEN), "scale 1"),
        ((BASE, HALF, STRONG), "scale 0.5"),
        ((BASE, STRONG), None),
        ((BASE, point("scale 1", 1.0, (0.9, "no evidence"), (0.9, "no evidence"))), None),
        ((BASE, WHOLE, dataclasses.replace(WHOLE, name="weaker", scale=0.7)), "weaker"),
        ((BASE, WHOLE, dataclasses.replace(WHOLE, name="step 50", step=50)), "step 50"),
        (tuple(dataclasses.replace(one, guard=None) for one in (BASE, HALF, STRONG)), "scale 1.5"),
    ],
)
def test_rule_recommends_best_point_without_worse_guardrail(
    points: tuple[SweepPoint, ...], expected: str | None
) -> None:
    assert best(*points) == expected
    words = advice(mark_recommended(points))
    assert (f"Recommended: {expected}." in words) if expected else "No strength of the adapter is recommended" in words


def test_pareto_chart_needs_a_guardrail() -> None:
    points = mark_recommended((BASE, HALF, WHOLE))
    assert 'aria-label="Primary metric and guardrail' in pareto_chart(points, True) and "scale 0.5" in pareto_chart(
        points, True
    )
    assert pareto_chart([dataclasses.replace(one, guard=None) for one in points], True) == ""
