"""Pairs that a page offers, with the file of their votes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_mm.labels.export import absolute_source
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.presenting import PresentedPair
from dpo_mm.labels.store import VoteStore

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PairSet:
    """Pairs to label and their votes. Number 0 is the labelled dataset, and n the fresh pairs of round n of training."""

    number: int
    rows: Dataset
    store: VoteStore
    row_numbers: dict[str, int]

    @classmethod
    def open(cls, pairs: str, votes: str | Path, *, number: int = 0) -> PairSet:
        """Open pairs, and the file of their votes.

        Raises:
            ValueError: as in `open_pairs` and `VoteStore`.
        """
        rows = open_pairs(pairs)
        ids = rows["id"][:]
        store = VoteStore(votes, ids, source=absolute_source(pairs), stays_open=True)
        return cls(number, rows, store, {pair: row for row, pair in enumerate(ids)})

    def presentation(self, shown: PresentedPair) -> str:
        """Return the name of a presentation on the page."""
        return f"{self.number}-{shown.id}" if self.number else str(shown.id)

    def presentation_id(self, name: str) -> int | None:
        """Return the id of a presentation of these pairs, or None for one of other pairs or none."""
        number, _, shown = name.rpartition("-")
        return int(shown) if shown.isdecimal() and number == (str(self.number) if self.number else "") else None
