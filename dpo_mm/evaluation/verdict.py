"""Result of a comparison, and the notes that every comparison may print next to its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpo_mm.evaluation.statistics import BASE_AND_TUNED, LEVEL, SHOWN_COLUMNS, Comparison, interval_verdict
from dpo_mm.printing.notebook_html import escaped, table_with_head

Overall = Literal["better", "no evidence", "worse", "differs", "over-optimised", "better here, worse elsewhere"]


@dataclass(frozen=True)
class CompareResult:
    """Result of a comparison.

    Args:
        verdict: one of `Overall`.
        comparisons: one per judge and pair of models.
        notes: caveats, one or two sentences each.
        report: path of report.html.
    """

    verdict: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    report: Path

    def __repr__(self) -> str:
        primary = next((f", {one!r}" for one in self.comparisons if one.headline), "")
        return f"CompareResult({self.verdict!r}{primary}, {str(self.report)!r})"

    def _repr_html_(self) -> str:
        title = f"Verdict: {self.verdict}"
        notes = "".join(f"<p>{escaped(note)}</p>" for note in self.notes)
        table = table_with_head(title, SHOWN_COLUMNS, [one.cells() for one in self.comparisons])
        return f"{table}{notes}<p>{escaped(self.report)}</p>"


def run_verdict(headline: Comparison, guards: Sequence[Comparison], sides: Sequence[Comparison] = ()) -> Overall:
    """Return the verdict on a run.

    Args:
        headline: the primary metric.
        guards: the guardrail metrics.
        sides: the metrics of the side sets.

    Returns:
        The primary metric's verdict. If it is better, "over-optimised" if a guardrail metric is worse, or else "better here,
        worse elsewhere" if a metric of a side set is worse.
    """
    if headline.verdict != "better":
        return headline.verdict
    if any(guard.verdict == "worse" for guard in guards):
        return "over-optimised"
    return "better here, worse elsewhere" if any(side.verdict == "worse" for side in sides) else "better"


def voters(primary: Comparison, items: str) -> str:
    """Return what has one vote, in the plural: the items (responses or questions), or images if several items are about one."""
    return items if primary.clusters == primary.n else "images"


def run_summary(comparisons: Sequence[Comparison], verdict: str, *, unit: str) -> str:
    """Sum up a run in a few sentences, with every metric that got significantly worse.

    Args:
        comparisons: of base and tuned, the primary metric among them.
        verdict: verdict on the run.
        unit: what has one vote, in the plural: prompts, responses or images.
    """
    primary = next(comparison for comparison in comparisons if comparison.headline)
    metric = primary.metric[:1].upper() + primary.metric[1:]
    clustered = "" if unit == "responses" else f", clustered by {unit.removesuffix('s')}"
    worse = [f"{each.name} ({each.base:.3f} to {each.tuned:.3f})" for each in comparisons if each.verdict == "worse"]
    return (
        f"{metric}: {primary.base:.3f} with the base model, {primary.tuned:.3f} with the tuned model "
        f"({primary.difference:+.3f}, {interval_text(primary)}{clustered}). "
        f"{primary.wins} {unit} improved, {primary.losses} got worse, {primary.ties} did not change. Verdict: {verdict}."
    ) + (f" Significantly worse: {', '.join(worse)}." if worse else "")


def interval_text(comparison: Comparison) -> str:
    """Write the 95 % interval, or how many differ if there is none."""
    if comparison.low is None or comparison.high is None:
        return f"too few differ for an interval: {comparison.wins} better, {comparison.losses} worse"
    return f"95 % interval {comparison.low:+.3f} to {comparison.high:+.3f}"


def note_training_judges(comparisons: Sequence[Comparison]) -> list[str]:
    """Name the judges that also built the training pairs, and explain it if one of them is the primary metric."""
    judges = [comparison.judge for comparison in comparisons if comparison.built_training_pairs]
    if not judges:
        return []
    primary = next(comparison for comparison in comparisons if comparison.headline)
    names = f"The judge {judges[0]}" if len(judges) == 1 else f"The judges {' and '.join(judges)}"
    note = f"{names} also built the training pairs, so the score is optimistic."
    if primary.built_training_pairs:
        note += (
            f" The judge {primary.judge} is still the primary metric, because it is rule-based. Compare on prompts "
            "that made no pairs. It cannot detect problems outside its rule."
        )
    return [note]


def note_unconfirmed(comparisons: Sequence[Comparison]) -> list[str]:
    """Name the metrics whose interval excludes 0 but whose sign test, or its corrected p, does not confirm it."""
    notes = []
    for comparison in comparisons:
        interval = interval_verdict(comparison)
        if comparison.models != BASE_AND_TUNED or interval == comparison.verdict:
            continue
        start = f"{comparison.name} {interval if interval == 'differs' else f'is {interval}'} by its interval"
        against = {"better": comparison.wins <= comparison.losses, "worse": comparison.losses <= comparison.wins}
        if comparison.p > LEVEL or against.get(interval, False):
            notes.append(
                f"{start}, but the sign test does not confirm it (p {comparison.p:.2g}, "
                f"{comparison.wins} better, {comparison.losses} worse). A verdict needs both."
            )
        else:
            notes.append(
                f"{start} and its sign test (p {comparison.p:.2g}), but not after Holm's correction for the number of "
                f"metrics (p {comparison.p_holm:.2g}). A verdict needs all of them."
            )
    return notes


def note_against_sft(comparison: Comparison) -> str:
    """Say whether DPO beats SFT on the same chosen side at equal steps.

    Args:
        comparison: the primary metric, SFT as base and DPO as tuned.
    """
    corrected = "" if comparison.p_holm is None else f", {comparison.p_holm:.2g} after Holm"
    result = (
        f"{comparison.metric} {comparison.difference:+.3f} "
        f"({interval_text(comparison)}, sign test p = {comparison.p:.2g}{corrected})"
    )
    notes = {
        "better": f"DPO beats SFT on the same data: {result}.",
        "worse": f"SFT on the chosen side is better than DPO here: {result}. Use SFT.",
        "differs": f"DPO and SFT on the chosen side differ: {result}. This metric has no better direction.",
        "no evidence": f"No evidence that DPO is better than SFT on the chosen side: {result}. SFT is cheaper.",
    }
    return notes[comparison.verdict]
