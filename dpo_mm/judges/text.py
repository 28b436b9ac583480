"""Judges of transcriptions: how many characters are wrong, and whether the reader has lost itself in a loop.

Three detectors of degeneration stand side by side, since none sees all: `degeneration` as the article behind this
project counts it, `trailing_repetition`, and `repetition`. Repetition that is in the truth (rows of zeros, dotted leaders) is none.
Sources: character and word error rate by jiwer; ANLS of Biten et al. 2019 (1905.13648); rep-n of Welleck et al. 2019
(1908.04319), over characters here, since loops in tables and leaders have no words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import jiwer
from rapidfuzz.distance import Levenshtein

from dpo_mm.data.schema import Response
from dpo_mm.judges import Explanation, Ratio

TAIL, TIMES = 15, 4
"""Characters at the end of an answer, and how often they must stand in it."""
RUNAWAY = re.compile(r"(.{1,5}?)\1{30,}\Z", re.DOTALL)
GRAM = 10
"""Characters of an n-gram of `repetition`."""
MIN_REPEATS = 3
"""Rounds of a loop that are seen as one, and that a training row keeps of it."""
NEAR = 30
"""Characters by which an answer may have run ahead of the truth or behind it before it looped."""
SHORTEST, LONGEST = 12, 400
"""Characters: the least that a loop takes up with all its rounds, and the longest round looked for."""


class Repetition(NamedTuple):
    """What an answer ends in, over and over: where the first round starts, characters a round, whole rounds."""

    start: int
    period: int
    repeats: int


def find_repetition(text: str) -> Repetition | None:
    """The loop that a text ends in, of the shortest round; the last round may be cut short. None where there is none."""
    for period in range(1, min(LONGEST, len(text) // MIN_REPEATS) + 1):
        start = len(text) - period
        while start > 0 and text[start - 1] == text[start - 1 + period]:
            start -= 1
        length = len(text) - start
        if length >= max(MIN_REPEATS * period, SHORTEST):
            return Repetition(start, period, length // period)
    return None


def truncate_repetition(text: str, truth: str = "") -> str:
    """The text with the loop that it ends in cut three rounds after the longest that its truth has of it.

    A rejected answer that loops for thousands of tokens would weigh nothing but the loop's own continuation, which is
    likely once it runs; what is to be unlearned is going into it, or not coming out of it where the truth does: of a
    dotted leader, three dots alone would be a beginning of the truth. Any other text is left as it is.
    """
    loop = find_repetition(text)
    if loop is None:
        return text
    unit = text[loop.start : loop.start + loop.period]
    return text[: loop.start + (_rounds(unit, truth) + MIN_REPEATS) * loop.period]


def _rounds(unit: str, text: str) -> int:
    """How often a unit stands in a text in a row, at most, with whichever of its characters that begins."""
    turned = {unit[n:] + unit[:n] for n in range(len(unit))}
    runs = [run[0] for one in turned for run in re.finditer(f"(?:{re.escape(one)})+", text)]
    return max(map(len, runs), default=0) // len(unit)


def degeneration(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Cut at the token limit, its last 15 characters there at least four times, and the truth not the same way."""
    return _rate([a.hit_limit and _tail(a.text) and not _tail(t) for a, t in zip(answers, truths, strict=True)])


def _tail(text: str) -> bool:
    return len(text) >= TAIL and text.count(text[-TAIL:]) >= TIMES


def trailing_repetition(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """One to five characters more than thirty times at its end, and the truth not the same way."""
    seen = [RUNAWAY.search(a.text) and not RUNAWAY.search(t) for a, t in zip(answers, truths, strict=True)]
    return _rate([bool(one) for one in seen])


def repetition(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """How much more of an answer repeats than of its truth: rep-10 over characters, [0, 1]."""
    return [Ratio(max(0.0, rep(a.text) - rep(t)), 1) for a, t in zip(answers, truths, strict=True)]


def rep(text: str, n: int = GRAM) -> float:
    """1 - different n-grams / n-grams, over characters, [0, 1); 0 for a text shorter than n."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def cer(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Characters to substitute, delete and insert, of the truth's characters."""
    return [_errors(jiwer.process_characters(t, a.text)) for a, t in zip(answers, truths, strict=True)]


def wer(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Words to substitute, delete and insert, of the truth's words."""
    return [_errors(jiwer.process_words(t, a.text)) for a, t in zip(answers, truths, strict=True)]


def _errors(found: jiwer.CharacterOutput | jiwer.WordOutput) -> Ratio:
    wrong = found.substitutions + found.deletions
    return Ratio(wrong + found.insertions, wrong + found.hits)


def anls(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """One less the normalised edit distance, without case; 0 where that is below one half."""
    likeness = [
        Levenshtein.normalized_similarity(a.text.strip().lower(), t.strip().lower())
        for a, t in zip(answers, truths, strict=True)
    ]
    return [Ratio(one if one >= 0.5 else 0.0, 1) for one in likeness]


def valid_json(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Whether the answer is an object with the truth's keys, of the answers whose truth is an object."""
    pairs = [(_object(a.text), _object(t)) for a, t in zip(answers, truths, strict=True)]
    return [Ratio(answer is not None and answer.keys() == t.keys(), 1) if t else Ratio(0, 0) for answer, t in pairs]


def _object(text: str) -> dict[str, object] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def truncated(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Whether the answer was cut at the token limit."""
    return _rate([answer.hit_limit for answer in answers])


def num_tokens(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Tokens of the answer: what it costs."""
    return [Ratio(answer.tokens, 1) for answer in answers]


def num_words(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Words of the answer: whether a model has won by silence, or by talk."""
    return [Ratio(len(answer.text.split()), 1) for answer in answers]


def explain_loop(answer: Response, truth: str) -> Explanation:
    """The loop that an answer ends in and its truth doesn't, in words, with where it stands."""
    loop = find_repetition(answer.text)
    if loop is None or truth.strip().endswith(answer.text.strip()[loop.start :]):
        return Explanation("cut at the token limit" if answer.hit_limit else "")
    unit = answer.text[loop.start : loop.start + loop.period]
    at_limit = ", cut at the token limit" if answer.hit_limit else ""
    return Explanation(f"{unit!r} x {loop.repeats} at the end{at_limit}", ((loop.start, len(answer.text)),))


def correct_loop(answer: Response, truth: str) -> str:
    """The answer as it was up to its loop's second round, and from there the truth; the truth where nothing loops.

    Where the truth goes on is the place whose beginning is most like what the answer had read by then.
    """
    loop = find_repetition(answer.text)
    if loop is None:
        return truth
    read = answer.text[: loop.start + loop.period]
    places = range(max(0, len(read) - NEAR), min(len(truth), len(read) + NEAR) + 1)
    return read + truth[min(places, key=lambda place: Levenshtein.distance(read, truth[:place])) :]


def _rate(hits: Sequence[bool]) -> list[Ratio]:
    return [Ratio(float(hit), 1) for hit in hits]
