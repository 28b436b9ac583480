"""A world without pictures: reach a number from another with an expression, "47 from 12" by "12+35".

Which answer is right is for a judge to find by running it. A writer that learned from sloppy notes forgets the carry and
writes the whole equation, which does not run; the notes here are sloppy in the same two ways.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LARGEST = 99
CHARACTERS = "0123456789+-=()* from"
FORGOTTEN, WRITTEN_OUT = 0.7, 0.6
"""Share of the notes that forget a carry where there is one, and that write the equation where something is taken away."""
HELD_OUT = 0.2
"""Share of all (number, start) that is kept from training."""


@dataclass(frozen=True)
class Sum:
    """A number to reach, 1 to 99, and another to start from."""

    number: int
    start: int

    @property
    def prompt(self) -> str:
        return f"{self.number} from {self.start}"

    @property
    def carries(self) -> bool:
        """Whether the ones run over or short of ten."""
        low, high = sorted((self.number, self.start))
        return high % 10 < low % 10

    @property
    def kind(self) -> str:
        sign = "add" if self.number > self.start else "take away"
        return f"{sign}, {'with' if self.carries else 'without'} a carry"


def sums(count: int, seed: int, *, held_out: bool = False) -> Iterator[Sum]:
    """Sums of one side of the split, none twice: at most `count` of them in an order given by the seed."""
    each = [
        Sum(number, start) for number in range(1, LARGEST + 1) for start in range(1, LARGEST + 1) if number != start
    ]
    side = [one for one in each if _apart(one) == held_out]
    yield from (side[n] for n in np.random.default_rng(seed).permutation(len(side))[:count])


def _apart(one: Sum) -> bool:
    digest = hashlib.sha256(one.prompt.encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32 < HELD_OUT


def expression(one: Sum) -> str:
    """The plain right answer."""
    gap = one.number - one.start
    return f"{one.start}{'+' if gap > 0 else '-'}{abs(gap)}"


def noisy_answer(one: Sum, rng: np.random.Generator) -> str:
    """An answer as sloppy notes have it: often off by ten where there is a carry, often as an equation that doesn't run."""
    gap = one.number - one.start
    size = abs(gap)
    if one.carries and rng.random() < FORGOTTEN:
        size += 10
    text = f"{one.start}{'+' if gap > 0 else '-'}{size}"
    return f"{text}={one.number}" if gap < 0 and rng.random() < WRITTEN_OUT else text
