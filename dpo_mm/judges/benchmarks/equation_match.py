"""Check if a rendered equation shows another one, by the rule of olmOCR-bench.

It does if its MathML contains the other's, or if each symbol of the other has a place in it: the same character, with the same
characters next to it above, below, left and right. Different symbols have different places. Places of neighbours fit each other
if the neighbour comes earlier in the equation.

Source: Poznanski et al. 2025 (2502.18443), github.com/allenai/olmocr (Apache-2.0), olmocr/bench/katex/render.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dpo_mm.judges.benchmarks.equation_browser import Rendering, Symbol

TOLERANCE = 5.0
"""Pixels by which the centres of neighbours differ across their direction."""
MAX_STEPS = 100_000
"""Tries of one comparison. One that needs more counts as no match. The published code has no limit."""
DIRECTIONS = 4


def shows(equation: Rendering, reference: Rendering) -> bool:
    """Check if an equation shows the reference, alone or as a part."""
    if reference.mathml in equation.mathml:
        return True
    return _Places(reference.symbols, equation.symbols).exist()


def neighbours(symbols: Sequence[Symbol]) -> np.ndarray:
    """Return the nearest symbol above, below, left and right of each, (symbols, 4), -1 without one."""
    x, y = (np.array([getattr(symbol, axis) for symbol in symbols], dtype=np.float64) for axis in ("x", "y"))
    nearest = np.full((len(symbols), DIRECTIONS), -1)
    for number in range(len(symbols)):
        right, down = x - x[number], y - y[number]
        in_column, in_row = np.abs(right) <= TOLERANCE, np.abs(down) <= TOLERANCE
        for direction, (distance, aligned) in enumerate(
            ((-down, in_column), (down, in_column), (-right, in_row), (right, in_row))
        ):
            distance = np.where(aligned & (distance > 0), distance, np.inf)
            if np.isfinite(distance).any():
                nearest[number, direction] = distance.argmin()
    return nearest


class _Places:
    """The places that symbols of a reference can have among those of an equation."""

    def __init__(self, reference: Sequence[Symbol], equation: Sequence[Symbol]) -> None:
        by_text = defaultdict(list)
        for number, symbol in enumerate(equation):
            by_text[symbol.text].append(number)
        self.places: list[set[int]] = [set(by_text[symbol.text]) for symbol in reference]
        if not all(self.places):
            return
        near, self.near = neighbours(reference).tolist(), neighbours(equation).tolist()
        self.earlier = [
            [(direction, other) for direction, other in enumerate(row) if 0 <= other < number]
            for number, row in enumerate(near)
        ]
        texts = [symbol.text for symbol in equation]
        for number, row in enumerate(near):
            wanted = [(direction, reference[other].text) for direction, other in enumerate(row) if other >= 0]
            self.places[number] = {
                place
                for place in self.places[number]
                if all(
                    self.near[place][direction] >= 0 and texts[self.near[place][direction]] == text
                    for direction, text in wanted
                )
            }

    def exist(self) -> bool:
        """Check if all symbols can have their places at once."""
        while all(self.places):
            if not self._narrow():
                return self._search()
        return False

    def _narrow(self) -> bool:
        """Remove places whose earlier neighbour cannot be where it would have to be. Return if there were any."""
        before = sum(map(len, self.places))
        for number in (*range(len(self.places)), *reversed(range(len(self.places)))):
            for direction, other in self.earlier[number]:
                own = {place for place in self.places[number] if self.near[place][direction] in self.places[other]}
                self.places[number] = own
                self.places[other] &= {self.near[place][direction] for place in own}
        return sum(map(len, self.places)) < before

    def _search(self) -> bool:
        """Place one symbol after the other, and go back if one has no place."""
        chosen: list[int] = []
        left = [iter(sorted(self.places[0]))] if self.places else []
        for _ in range(MAX_STEPS if left else 0):
            place = next(left[-1], None)
            if place is None:
                left.pop()
                if not left:
                    return False
                chosen.pop()
            elif place not in chosen and self._fits(len(chosen), place, chosen):
                chosen.append(place)
                if len(chosen) == len(self.places):
                    return True
                left.append(iter(sorted(self.places[len(chosen)])))
        return not self.places

    def _fits(self, number: int, place: int, chosen: Sequence[int]) -> bool:
        return all(chosen[other] == self.near[place][direction] for direction, other in self.earlier[number])
