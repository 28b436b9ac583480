"""Answers of base and tuned to be read on a page: what a judge objects to is marked, loops are folded."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

LOOP = re.compile(r"(.{1,200}?)\1{2,}", re.DOTALL)
FOLDED, SHOWN = 80, 24  # characters; a longer run of repeats is folded, but for so much of it


@dataclass(frozen=True)
class TextExample:
    """One image read by both models. Marks: (start, end) in characters, what the judge found invented."""

    image: Image.Image | None
    prompt: str
    base: str
    tuned: str
    truth: str | None = None
    base_marks: tuple[tuple[int, int], ...] = ()
    tuned_marks: tuple[tuple[int, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class TextSpan:
    """A stretch of a text; marked: the judge objects to it; repeats: > 0 where it is the folded rest of a loop."""

    text: str
    marked: bool = False
    repeats: int = 0


def text_spans(text: str, marks: Sequence[tuple[int, int]] = ()) -> list[TextSpan]:
    """A text cut where marks begin and end, long loops folded after their first rounds; the pieces join to the text.

    marks: (start, end) in characters, start <= end, may overlap. Raises ValueError where one lies outside the text.
    """
    for start, end in marks:
        if not 0 <= start <= end <= len(text):
            raise ValueError(f"mark ({start}, {end}) lies outside its text of {len(text)} characters")
    cut: list[TextSpan] = []
    place = 0
    for start, end, repeats in _loops(text):
        marked = any(a < end and start < b for a, b in marks)
        cut += [*_marked(text, place, start, marks), TextSpan(text[start:end], marked, repeats)]
        place = end
    return cut + _marked(text, place, len(text), marks)


def _loops(text: str) -> Iterator[tuple[int, int, int]]:
    """Start, end (characters) and rounds of what to fold: a long loop but for its first rounds, about `SHOWN` of it."""
    for match in LOOP.finditer(text):
        period = len(match[1])
        rounds, shown = len(match[0]) // period, math.ceil(SHOWN / period)
        if len(match[0]) > FOLDED:
            yield match.start() + shown * period, match.end(), rounds - shown


def _marked(text: str, start: int, end: int, marks: Sequence[tuple[int, int]]) -> list[TextSpan]:
    edges = sorted({start, end, *(edge for mark in marks for edge in mark if start < edge < end)})
    spans = itertools.pairwise(edges)
    return [TextSpan(text[a:b], any(first <= a and b <= last for first, last in marks)) for a, b in spans]
