"""Text of responses for a page, with errors highlighted and repetition loops folded."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from rapidfuzz.distance import Levenshtein

LOOP = re.compile(r"(.{1,200}?)\1{2,}", re.DOTALL)
WORDS = re.compile(r"[^\W\u2e80-\U0003ffff]+|\s+|.", re.DOTALL)
"""Words, white space, and single characters of anything else, Chinese and Japanese among them."""
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
        is_transcription: whether the ground truth is a text that the responses should repeat. The page then shows how they
            differ from it.
    """

    image: Image.Image | None
    prompt: str
    base: str
    tuned: str
    ground_truth: str | None = None
    base_marks: tuple[tuple[int, int], ...] = ()
    tuned_marks: tuple[tuple[int, int], ...] = ()
    note: str = ""
    is_transcription: bool = False


@dataclass(frozen=True)
class TextSpan:
    """Part of a text.

    Args:
        text: its characters.
        marked: whether the judge objects to it, or the ground truth does not have it.
        repeats: number of repeats if it is the folded rest of a loop, else 0.
        missing: whether only the ground truth has it.
    """

    text: str
    marked: bool = False
    repeats: int = 0
    missing: bool = False


@dataclass(frozen=True)
class Differences:
    """Differences between a transcription and its ground truth.

    Args:
        extra: (start, end) in the transcription, in characters, of what the ground truth does not have there.
        missing: position in the transcription, in characters, and text that should stand there.
    """

    extra: tuple[tuple[int, int], ...] = ()
    missing: tuple[tuple[int, str], ...] = ()


def differences(text: str, ground_truth: str) -> Differences:
    """Find the fewest words to remove and to add that turn a transcription into its ground truth."""
    words, true_words = WORDS.findall(text), WORDS.findall(ground_truth)
    starts = [0, *itertools.accumulate(map(len, words))]
    edits = [edit for edit in Levenshtein.opcodes(words, true_words) if edit.tag != "equal"]
    return Differences(
        tuple((starts[edit.src_start], starts[edit.src_end]) for edit in edits if edit.src_end > edit.src_start),
        tuple(
            (starts[edit.src_end], "".join(true_words[edit.dest_start : edit.dest_end]))
            for edit in edits
            if edit.dest_end > edit.dest_start
        ),
    )


def transcription_spans(text: str, ground_truth: str) -> list[TextSpan]:
    """Split a transcription at its differences from the ground truth, with long loops folded.

    Returns:
        Spans whose texts join to `text` without those that are missing.
    """
    found = differences(text, ground_truth)
    spans: list[TextSpan] = []
    position, missing = 0, list(found.missing)
    for span in text_spans(text, found.extra, edges=[at for at, _ in missing]):
        while missing and missing[0][0] <= position:
            spans.append(TextSpan(missing.pop(0)[1], missing=True))
        spans.append(span)
        position += len(span.text)
    return spans + [TextSpan(words, missing=True) for _, words in missing]


def text_spans(text: str, marks: Sequence[tuple[int, int]] = (), *, edges: Sequence[int] = ()) -> list[TextSpan]:
    """Split a text at its marks and fold long loops after their first repeats.

    Args:
        text: any text.
        marks: (start, end) in characters, start <= end. They may overlap.
        edges: further positions to split at, in characters.

    Returns:
        Spans whose texts join to `text`.

    Raises:
        ValueError: if a mark lies outside the text.
    """
    for start, end in marks:
        if not 0 <= start <= end <= len(text):
            raise ValueError(f"mark ({start}, {end}) lies outside its text of {len(text)} characters")
    spans: list[TextSpan] = []
    position, marks = 0, [*marks, *((edge, edge) for edge in edges)]
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
