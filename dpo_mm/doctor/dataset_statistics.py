"""Statistics collected in one pass over a dataset: counts, and a few hundred bytes of digests and features per pair."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_mm.doctor.checks import CHECKS, Finding, RowProblems, first_examples, row_count_text
from dpo_mm.doctor.loading import Row
from dpo_mm.doctor.shortcuts import MIN_ACCURACY, ShortcutTest

NON_COMMERCIAL = re.compile(r"\bnc\b|non[- ]?commercial|research[- ]only", re.IGNORECASE)
ERROR_ACCURACY = 0.8
"""Accuracy from which a shortcut is an error instead of a warning."""
MIN_MODEL_PAIRS = 20
"""Number of pairs of two known, different models below which models are not checked."""


def digest(*parts: str | int) -> int:
    """Return 63 bits of a hash, which fit into NumPy's int64."""
    data = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def plain_text(prompt: str) -> str:
    """Normalise a prompt for comparison: ignore case, repeated spaces and a full stop at the end."""
    return " ".join(prompt.casefold().split()).rstrip(".! ")


@dataclass
class DatasetStatistics:
    """Statistics of a dataset: counts over all rows, and one array per feature over the pairs with a winner.

    Args:
        num_rows: number of rows read.
        problems: problems of single rows.
        counts: number of rows (or images) per value, by property, such as source or format.
        ids: ids of the pairs with a winner.
        models: models of winner and loser of these pairs, "" if unknown.
        num_uncertain: number of rows with a tie, votes, a probability, scores or a score gap.
        one_sided: number of rows with one image or response, by "liked or chosen" and "disliked".
    """

    num_rows: int = 0
    problems: RowProblems = field(default_factory=RowProblems)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    ids: list[str] = field(default_factory=list)
    models: list[tuple[str, str]] = field(default_factory=list)
    num_uncertain: int = 0
    one_sided: dict[str, int] = field(default_factory=dict)
    one_sided_ids: list[str] = field(default_factory=list)
    _batch: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    _columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def add_problem(self, check: str, row: Row, comment: str = "") -> None:
        """Count a row for a check."""
        self.problems.add(check, row["id"], comment)

    def add_row(self, row: Row) -> None:
        """Count a row of either kind, with its source and licence."""
        self.num_rows += 1
        self.counts["source"][row.get("source") or "not named"] += 1
        license = row.get("license")
        self.counts["licence"][license or "none"] += 1
        if not license:
            self.add_problem("licence-missing", row)
        elif NON_COMMERCIAL.search(license):
            self.add_problem("licence-non-commercial", row, license)

    def add_pair(self, row: Row, winner_model: Any, loser_model: Any, **values: Any) -> None:
        """Add a pair with a winner: the two models, and one value per column."""
        self.ids.append(row["id"])
        self.models.append((winner_model or "", loser_model or ""))
        for name, value in values.items():
            self._batch[name].append(value)

    def add_one_sided(self, row_id: str, *, liked: bool) -> None:
        """Count a row with one image or response."""
        self.one_sided_ids.append(row_id)
        kind = "liked or chosen" if liked else "disliked"
        self.one_sided[kind] = self.one_sided.get(kind, 0) + 1

    def pack(self) -> None:
        """Join the values of a batch into one array per column. Single values take more memory."""
        for name, values in self._batch.items():
            self._columns[name].append(np.stack(values))
        self._batch.clear()

    def column(self, name: str) -> np.ndarray:
        """Return the values of a column for all pairs, (pairs, ...)."""
        self.pack()
        return np.concatenate(self._columns[name])


def check_models(statistics: DatasetStatistics) -> list[Finding]:
    """Check whether one model always wins or always loses, and whether all pairs compare the same two models."""
    ids, models = statistics.ids, statistics.models
    pairs = [(n, winner, loser) for n, (winner, loser) in enumerate(models) if winner and loser and winner != loser]
    if len(pairs) < MIN_MODEL_PAIRS or len(pairs) < len(models) / 2:
        return []
    wins, losses = Counter(winner for _, winner, _ in pairs), Counter(loser for _, _, loser in pairs)
    best, best_wins = wins.most_common(1)[0]
    worst, worst_losses = losses.most_common(1)[0]
    total, findings = len(ids), []
    if best_wins >= 0.95 * len(pairs) and losses[best] <= 0.05 * len(pairs):
        summary = f"{best} is the winner of {row_count_text(best_wins, total)}"
        examples = first_examples(ids, [n for n, winner, _ in pairs if winner == best])
        findings.append(Finding("model-always-wins", "error", best_wins, total, summary, examples))
    elif worst_losses >= 0.95 * len(pairs) and wins[worst] <= 0.05 * len(pairs):
        summary = f"{worst} is the loser of {row_count_text(worst_losses, total)}"
        examples = first_examples(ids, [n for n, _, loser in pairs if loser == worst])
        findings.append(Finding("model-always-wins", "error", worst_losses, total, summary, examples))
    if len(set(wins) | set(losses)) == 2:
        first, second = sorted(set(wins) | set(losses))
        summary = f"{first} against {second} in {row_count_text(len(pairs), total)}, {first} wins {wins[first] / len(pairs):.0%}"
        examples = first_examples(ids, [n for n, _, _ in pairs])
        findings.append(Finding("same-two-models", "warning", len(pairs), total, summary, examples))
    return findings


FEATURE_PHRASES = {
    "resolution": ("has more pixels", "has fewer pixels"),
    "aspect": ("is wider for its height", "is narrower for its height"),
    "bytes": ("has the larger file", "has the smaller file"),
    "brightness": ("is brighter", "is darker"),
    "contrast": ("has more contrast", "has less contrast"),
    "saturation": ("has more saturated colours", "has less saturated colours"),
    "length": ("is longer", "is shorter"),
    "lines": ("has more lines", "has fewer lines"),
    "refusal": ("is a refusal", "is not a refusal"),
}


def feature_phrases(name: str) -> tuple[str, str]:
    """Return the phrases for a winner that has more of a feature than the loser, and for one that has less."""
    formats = {"png": "PNG", "jpeg": "JPEG", "webp": "WebP"}
    if name in formats:
        return f"is {formats[name]}", f"is not {formats[name]}"
    return FEATURE_PHRASES.get(name) or (f"has more {name}", f"has fewer {name}")


def shortcut_finding(
    check: str, feature: str, test: ShortcutTest, differences: np.ndarray, ids: list[str], *, rare: bool = False
) -> list[Finding]:
    """Return a finding if a feature predicts the winner. Its examples are the pairs that differ most.

    Args:
        differences: the feature of the winner less that of the loser, (pairs,).
        rare: report the feature also if so few pairs differ in it that the accuracy over all pairs is low.
    """
    if not test.significant or (test.accuracy < MIN_ACCURACY and not rare):
        return []
    severity = "error" if CHECKS[check].severity == "error" and test.accuracy >= ERROR_ACCURACY else "warning"
    more = test.fraction_more >= 0.5
    phrase, fraction = (
        feature_phrases(feature)[0 if more else 1],
        test.fraction_more if more else 1 - test.fraction_more,
    )
    summary = (
        f"the winner {phrase} in {fraction:.0%} of the {test.num_differing:,} pairs that differ in it, "
        f"which predicts {test.accuracy:.0%} of all winners (chance 50 %)"
    )
    rows = np.argsort(-differences if more else differences, kind="stable")
    return [Finding(check, severity, test.num_differing, len(ids), summary, first_examples(ids, rows))]


def check_missing_votes(statistics: DatasetStatistics, uncertain_sources: set[str]) -> list[Finding]:
    """Check whether a dataset has no tie, vote, probability, score or score gap at all.

    Args:
        uncertain_sources: names of sources that publish them. For a dataset from one of these, the finding is a warning.
    """
    num_rows = statistics.num_rows
    if statistics.num_uncertain or not num_rows or not statistics.ids:
        return []
    sources = sorted(set(statistics.counts["source"]) & uncertain_sources)
    summary = f"none in {num_rows:,} rows" + (f", although {', '.join(sources)} publishes them" if sources else "")
    severity = "warning" if sources else "note"
    return [Finding("no-ties-or-votes", severity, num_rows, num_rows, summary)]
