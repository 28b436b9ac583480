"""Synthetic arithmetic without images: reach a number from another with an expression, "47 from 12" by "12+35".

A judge finds the right answers by evaluating them. A model that was trained on noisy notes forgets the carry, and writes
the whole equation, which cannot be evaluated. The notes here have the same two errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LARGEST = 99
CHARACTERS = "0123456789+-=()* from"
FORGOTTEN, WRITTEN_OUT = 0.7, 0.6
"""Fraction of the noisy notes with a carry that forget it, and of those with a subtraction that write the equation."""
HELD_OUT = 0.2
"""Fraction of all (number, start) that is held out."""


@dataclass(frozen=True)
class Sum:
    """A number to reach, 1 to 99, and another to start from."""

    number: int
    start: int

    @property
    def prompt(self) -> str:
        """Prompt of the sum, such as "47 from 12"."""
        return f"{self.number} from {self.start}"

    @property
    def carries(self) -> bool:
        """True if the ones digits carry over ten or borrow from it."""
        low, high = sorted((self.number, self.start))
        return high % 10 < low % 10

    @property
    def kind(self) -> str:
        """Category of the sum: addition or subtraction, with or without a carry."""
        sign = "add" if self.number > self.start else "take away"
        return f"{sign}, {'with' if self.carries else 'without'} a carry"


def sums(count: int, seed: int, *, held_out: bool = False) -> Iterator[Sum]:
    """Generate at most `count` different sums of one split, in an order given by the seed."""
    numbers = range(1, LARGEST + 1)
    all_sums = [Sum(number, start) for number in numbers for start in numbers if number != start]
    of_split = [one for one in all_sums if _is_held_out(one) == held_out]
    yield from (of_split[n] for n in np.random.default_rng(seed).permutation(len(of_split))[:count])


def _is_held_out(one: Sum) -> bool:
    digest = hashlib.sha256(one.prompt.encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32 < HELD_OUT


def expression(one: Sum) -> str:
    """Right answer of a sum, such as "12+35"."""
    difference = one.number - one.start
    return f"{one.start}{'+' if difference > 0 else '-'}{abs(difference)}"


def noisy_answer(one: Sum, rng: np.random.Generator) -> str:
    """Answer of the noisy notes: often off by ten if there is a carry, often an equation that cannot be evaluated."""
    difference = one.number - one.start
    size = abs(difference)
    if one.carries and rng.random() < FORGOTTEN:
        size += 10
    text = f"{one.start}{'+' if difference > 0 else '-'}{size}"
    return f"{text}={one.number}" if difference < 0 and rng.random() < WRITTEN_OUT else text
