"""The result of a comparison and the notes beside its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_mm.evaluation.statistics import LEVEL, Comparison, confirmed_verdict


@dataclass(frozen=True)
class CompareResult:
    """What a comparison found, and the folder that its report is in."""

    verdict: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    report: Path


def note_training_judges(found: Sequence[Comparison]) -> list[str]:
    """That judges made the training pairs, in words; whether one of them stands at the head."""
    named = [one.judge for one in found if one.built_training_pairs]
    if not named:
        return []
    head = next(one for one in found if one.headline)
    words = f"{' and '.join(named)} made the training pairs: the model was taught what pleases them."
    if head.built_training_pairs:
        words += (
            f" {head.judge} may stand at the head all the same: it judges by rule, with nothing learned that could be "
            "fooled, and of other prompts. What its rule does not look at, this report does not see."
        )
    return [words]


def note_unconfirmed(found: Sequence[Comparison]) -> list[str]:
    """Notes on metrics whose interval excludes 0 while the sign test, plain or after Holm's correction, confirms nothing.

    Args:
        found: comparisons of base and tuned, and others, which are ignored.
    """
    notes = []
    for one in found:
        if one.p_holm is None or one.verdict == "no evidence" or one.models != ("base", "tuned"):
            continue
        if confirmed_verdict(one) != one.verdict:
            both = " A verdict needs both." if one.headline else ""
            notes.append(
                f"{one.metric} is {one.verdict} by its interval, but the sign test does not confirm it (p {one.p:.2g}, "
                f"{one.wins} better, {one.losses} worse).{both}"
            )
        elif one.p_holm > LEVEL:
            notes.append(
                f"{one.metric} is {one.verdict} by its interval and its sign test (p {one.p:.2g}), but not after Holm's "
                f"correction for the number of judges (p {one.p_holm:.2g})."
            )
    return notes


def note_against_sft(against: Comparison) -> str:
    """Whether DPO earned its keep over SFT on the same chosen pictures at equal steps, in words."""
    span = f"{against.difference:+.3f}, 95 % interval {against.low:+.3f} to {against.high:+.3f}"
    words = {
        "better": f"DPO earned its keep: {against.metric} {span}.",
        "worse": f"SFT on the chosen would have done better: {against.metric} {span}. Prefer it here.",
        "differs": f"DPO and SFT differ, neither for better: {against.metric} {span}.",
        "no evidence": f"No evidence that DPO does better than SFT on the chosen here: {against.metric} {span}. SFT is cheaper.",
    }
    return words[confirmed_verdict(against)]
