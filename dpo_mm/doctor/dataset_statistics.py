"""What is kept of a set while it passes: digests and numbers, a few hundred bytes a pair, and counts."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_mm.doctor.checks import CHECKS, Finding, Notes, examples, share
from dpo_mm.doctor.loading import Row
from dpo_mm.doctor.shortcuts import LEAST, Told

NON_COMMERCIAL = re.compile(r"\bnc\b|non[- ]?commercial|research[- ]only", re.IGNORECASE)
STRONG = 0.8
"""Accuracy at which a shortcut is an error and not a warning."""
FEW = 20
"""Pairs below which nothing is said about models."""


def digest(*parts: str | int) -> int:
    """63 bits of a hash, so that NumPy can hold it."""
    data = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def plain(prompt: str) -> str:
    """A prompt without what two copies of it may differ in: case, spaces, a full stop at the end."""
    return " ".join(prompt.casefold().split()).rstrip(".! ")


@dataclass
class DatasetStatistics:
    """Counts over all rows, and columns of the pairs that can be compared, (pairs, ...) once joined."""

    rows: int = 0
    notes: Notes = field(default_factory=Notes)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    ids: list[str] = field(default_factory=list)
    sides: list[tuple[str, str]] = field(default_factory=list)
    uncertain: int = 0
    _loose: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    _packed: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def note(self, check: str, row: Row, what: str = "") -> None:
        self.notes.add(check, row["id"], what)

    def common(self, row: Row) -> None:
        """What every row of every kind is asked."""
        self.rows += 1
        self.counts["source"][row.get("source") or "not named"] += 1
        license = row.get("license")
        self.counts["licence"][license or "none"] += 1
        if not license:
            self.note("licence-missing", row)
        elif NON_COMMERCIAL.search(license):
            self.note("licence-non-commercial", row, license)

    def pair(self, row: Row, winner: Any, loser: Any, **values: Any) -> None:
        """A pair to compare; models of its winner and loser, and a value for each column."""
        self.ids.append(row["id"])
        self.sides.append((winner or "", loser or ""))
        for name, value in values.items():
            self._loose[name].append(value)

    def pack(self) -> None:
        """Make one array of each column's values since the last time: after a batch, for small values take more room."""
        for name, values in self._loose.items():
            self._packed[name].append(np.stack(values))
        self._loose.clear()

    def column(self, name: str) -> np.ndarray:
        """A column, (pairs, ...)."""
        self.pack()
        return np.concatenate(self._packed[name])


def makers(seen: DatasetStatistics) -> list[Finding]:
    """Findings about who made the sides: one model that always wins, two models throughout."""
    apart = [(n, winner, loser) for n, (winner, loser) in enumerate(seen.sides) if winner and loser and winner != loser]
    if len(apart) < FEW or len(apart) < len(seen.sides) / 2:
        return []
    won, lost = Counter(winner for _, winner, _ in apart), Counter(loser for _, _, loser in apart)
    model, wins = won.most_common(1)[0]
    worst, losses = lost.most_common(1)[0]
    total, found = len(seen.ids), []
    if wins >= 0.95 * len(apart) and lost[model] <= 0.05 * len(apart):
        what, rows = f"{model} is the winner of {share(wins, total)}", [n for n, winner, _ in apart if winner == model]
        found.append(Finding("model-always-wins", "error", wins, total, what, examples(seen.ids, rows)))
    elif losses >= 0.95 * len(apart) and won[worst] <= 0.05 * len(apart):
        what, rows = f"{worst} is the loser of {share(losses, total)}", [n for n, _, loser in apart if loser == worst]
        found.append(Finding("model-always-wins", "error", losses, total, what, examples(seen.ids, rows)))
    if len(set(won) | set(lost)) == 2:
        one, other = sorted(set(won) | set(lost))
        what = f"{one} against {other} in {share(len(apart), total)}; {one} wins {won[one] / len(apart):.0%}"
        rows = [n for n, _, _ in apart]
        found.append(Finding("same-two-models", "warning", len(apart), total, what, examples(seen.ids, rows)))
    return found


WORDS = {
    "resolution": ("has more pixels", "has fewer pixels"),
    "aspect": ("is wider for its height", "is narrower for its height"),
    "bytes": ("has the larger file", "has the smaller file"),
    "brightness": ("is brighter", "is darker"),
    "contrast": ("has more contrast", "has less contrast"),
    "saturation": ("has more colour", "has less colour"),
    "length": ("is longer", "is shorter"),
    "lines": ("has more lines", "has fewer lines"),
    "refusal": ("is the one that refuses", "is the one that doesn't refuse"),
}


def words(name: str) -> tuple[str, str]:
    """What is said of a winner that has more of a feature, and of one that has less."""
    format = (
        ("is the {} one", "is the one that is no {}")
        if name in ("png", "jpeg", "webp")
        else ("has more {}", "has fewer {}")
    )
    shown = name.upper() if name in ("png", "jpeg") else "WebP" if name == "webp" else name
    return WORDS.get(name) or (format[0].format(shown), format[1].format(shown))


def shortcut(
    check: str, name: str, told: Told, difference: np.ndarray, ids: list[str], *, rare: bool = False
) -> list[Finding]:
    """A finding where a feature tells the winner. rare: also where few pairs differ in it at all.

    difference: winner less loser, (pairs,); the examples are those that differ most.
    """
    if not told.sure or (told.accuracy < LEAST and not rare):
        return []
    severity = "error" if CHECKS[check].severity == "error" and told.accuracy >= STRONG else "warning"
    more = told.share >= 0.5
    way, part = (words(name)[0], told.share) if more else (words(name)[1], 1 - told.share)
    what = (
        f"the winner {way} in {part:.0%} of the {told.differ:,} pairs that differ in it; "
        f"that alone tells {told.accuracy:.0%} of all winners (chance 50 %)"
    )
    rows = np.argsort(-difference if more else difference, kind="stable")
    return [Finding(check, severity, told.differ, len(ids), what, examples(ids, rows))]


def lost(seen: DatasetStatistics, known: set[str]) -> list[Finding]:
    """A finding where no row has a tie, a vote, a probability, a score or a margin. known: sources that have them."""
    if seen.uncertain or not seen.rows:
        return []
    named = sorted(set(seen.counts["source"]) & known)
    what = f"none in {seen.rows:,} rows" + (f", though {', '.join(named)} has them" if named else "")
    severity = "warning" if named else "note"
    return [Finding("ties-and-votes-lost", severity, seen.rows, seen.rows, what)]
