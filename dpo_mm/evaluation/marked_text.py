"""Text of responses for a page, with errors highlighted and repetition loops folded."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

LOOP = re.compile(r"(.{1,200}?)\1{2,}", re.DOTALL)
MAX_UNFOLDED = 80
"""Characters. A longer loop is folded."""
VISIBLE = 24
"""Characters of a folded loop that stay visible, about."""


@dataclass(frozen=True)
class TextExample:
    """Responses of both models to one prompt.

    Args:
        image: the prompt's image, if there is one.
        prompt: its text.
        base, tuned: the responses.
        ground_truth: the correct response, if there is one.
        base_marks, tuned_marks: (start, end) in characters of what the judge objects to.
        note: the judge's reasons.
    """

    image: Image.Image | None
    prompt: str
    base: str
    tuned: str
    ground_truth: str | None = None
    base_marks: tuple[tuple[int, int], ...] = ()
    tuned_marks: tuple[tuple[int, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class TextSpan:
    """Part of a text.

    Args:
        text: its characters.
        marked: whether the judge objects to it.
        repeats: number of repeats if it is the folded rest of a loop, else 0.
    """

    text: str
    marked: bool = False
    repeats: int = 0


def text_spans(text: str, marks: Sequence[tuple[int, int]] = ()) -> list[TextSpan]:
    """Split a text at its marks and fold long loops after their first repeats.

    Args:
        text: any text.
        marks: (start, end) in characters, start <= end. They may overlap.

    Returns:
        Spans whose texts join to `text`.

    Raises:
        ValueError: if a mark lies outside the text.
    """
    for start, end in marks:
        if not 0 <= start <= end <= len(text):
            raise ValueError(f"mark ({start}, {end}) lies outside its text of {len(text)} characters")
    spans: list[TextSpan] = []
    position = 0
    for start, end, repeats in _loops(text):
        marked = any(a < end and start < b for a, b in marks)
        spans += [*_marked(text, position, start, marks), TextSpan(text[start:end], marked, repeats)]
        position = end
    return spans + _marked(text, position, len(text), marks)


def _loops(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield start and end (characters) and number of repeats of each part to fold."""
    for match in LOOP.finditer(text):
        period = len(match[1])
        repeats, visible = len(match[0]) // period, math.ceil(VISIBLE / period)
        if len(match[0]) > MAX_UNFOLDED:
            yield match.start() + visible * period, match.end(), repeats - visible


def _marked(text: str, start: int, end: int, marks: Sequence[tuple[int, int]]) -> list[TextSpan]:
    """Split text[start:end] at the marks."""
    edges = sorted({start, end, *(edge for mark in marks for edge in mark if start < edge < end)})
    return [
        TextSpan(text[a:b], any(first <= a and b <= last for first, last in marks))
        for a, b in itertools.pairwise(edges)
    ]
