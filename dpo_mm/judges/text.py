"""Judges of transcriptions: error rates, and detectors of responses that degenerate into a repetition loop.

There are three detectors, since none of them finds every case: `degeneration` follows the definition of the article
behind this project, the others are `trailing_repetition` and `repetition`. Repetition that is also in the ground truth
(rows of zeros, dotted leaders) does not count.

Sources: character and word error rate by jiwer. ANLS of Biten et al. 2019 (1905.13648). rep-n of Welleck et al. 2019
(1908.04319), here over characters, since loops in tables and leaders have no words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import jiwer
from rapidfuzz.distance import Levenshtein

from dpo_mm.data.schema import Response
from dpo_mm.judges import Explanation, Ratio

TAIL_LENGTH, MIN_TAIL_COUNT = 15, 4
"""Characters at the end of a response, and how often they must occur in it."""
TRAILING_REPETITION = re.compile(r"(.{1,5}?)\1{30,}\Z", re.DOTALL)
NGRAM_LENGTH = 10
"""Characters of an n-gram of `repetition`."""
MIN_REPEATS = 3
"""Repeats that make a loop, and repeats that a training row keeps beyond those of its ground truth."""
RESUME_WINDOW = 30
"""Largest difference in characters between the lengths of a response before its loop and of the ground truth read so far."""
MIN_LOOP_LENGTH, MAX_PERIOD = 12, 400
"""Characters: the shortest loop with all its repeats, and the longest repeated unit that is searched."""


class Repetition(NamedTuple):
    """The loop at the end of a text.

    Attributes:
        start: index of the first repeat, in characters.
        period: length of the repeated unit, in characters.
        repeats: number of complete repeats.
    """

    start: int
    period: int
    repeats: int


def find_repetition(text: str) -> Repetition | None:
    """Find the loop at the end of a text, with the shortest unit. The last repeat may be incomplete.

    Returns:
        The loop, or None if the text does not end in one.
    """
    for period in range(1, min(MAX_PERIOD, len(text) // MIN_REPEATS) + 1):
        start = len(text) - period
        while start > 0 and text[start - 1] == text[start - 1 + period]:
            start -= 1
        length = len(text) - start
        if length >= max(MIN_REPEATS * period, MIN_LOOP_LENGTH):
            return Repetition(start, period, length // period)
    return None


def truncate_repetition(text: str, ground_truth: str = "") -> str:
    """Truncate the loop at the end of a text to three repeats more than the ground truth has in a row.

    Without truncation, most of a long rejected response is the loop continuing, which is likely once it has started.
    Training should make the model unlearn entering the loop, or staying in it longer than the ground truth. If a dotted
    leader were truncated to three dots, it would be a prefix of the ground truth and carry no signal. A text that does
    not end in a loop is returned unchanged.
    """
    loop = find_repetition(text)
    if loop is None:
        return text
    unit = text[loop.start : loop.start + loop.period]
    return text[: loop.start + (_max_repeats(unit, ground_truth) + MIN_REPEATS) * loop.period]


def _max_repeats(unit: str, text: str) -> int:
    """Largest number of repeats of a unit in a row in a text. Each rotation of the unit counts."""
    rotations = {unit[n:] + unit[:n] for n in range(len(unit))}
    runs = [run[0] for rotation in rotations for run in re.finditer(f"(?:{re.escape(rotation)})+", text)]
    return max(map(len, runs), default=0) // len(unit)


def degeneration(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Degeneration rate.

    A response degenerates if it is truncated at the token limit and its last 15 characters occur in it at least four
    times, and the same is not true of the ground truth.
    """
    return _rate(
        [r.hit_limit and _repeats_tail(r.text) and not _repeats_tail(t) for r, t in _pairs(responses, ground_truths)]
    )


def _repeats_tail(text: str) -> bool:
    return len(text) >= TAIL_LENGTH and text.count(text[-TAIL_LENGTH:]) >= MIN_TAIL_COUNT


def trailing_repetition(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of responses that end in one to five characters more than thirty times, unlike the ground truth."""
    return _rate(
        [
            bool(TRAILING_REPETITION.search(r.text) and not TRAILING_REPETITION.search(t))
            for r, t in _pairs(responses, ground_truths)
        ]
    )


def repetition(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Excess repetition: rep-10 over characters of a response minus that of its ground truth, clipped to [0, 1]."""
    return [Ratio(max(0.0, rep(r.text) - rep(t)), 1) for r, t in _pairs(responses, ground_truths)]


def rep(text: str, n: int = NGRAM_LENGTH) -> float:
    """rep-n over characters: 1 - distinct n-grams / n-grams, in [0, 1). It is 0 for a text shorter than n."""
    ngrams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def cer(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Character error rate: substituted, deleted and inserted characters, divided by those of the ground truth."""
    return [
        _error_rate(jiwer.process_characters(_composed(t), _composed(r.text)))
        for r, t in _pairs(responses, ground_truths)
    ]


def wer(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Word error rate: substituted, deleted and inserted words, divided by those of the ground truth."""
    return [
        _error_rate(jiwer.process_words(_composed(t), _composed(r.text))) for r, t in _pairs(responses, ground_truths)
    ]


def _composed(text: str) -> str:
    """Text in Unicode's NFC, in which an accent is one character however it was typed."""
    return unicodedata.normalize("NFC", text)


def _error_rate(alignment: jiwer.CharacterOutput | jiwer.WordOutput) -> Ratio:
    wrong = alignment.substitutions + alignment.deletions
    return Ratio(wrong + alignment.insertions, wrong + alignment.hits)


def anls(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """ANLS: one minus the normalised edit distance, ignoring case. It is 0 if that is below one half."""
    similarities = [
        Levenshtein.normalized_similarity(_composed(r.text).strip().lower(), _composed(t).strip().lower())
        for r, t in _pairs(responses, ground_truths)
    ]
    return [Ratio(similarity if similarity >= 0.5 else 0.0, 1) for similarity in similarities]


def valid_json(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of JSON objects with the ground truth's keys, of the responses whose ground truth is an object."""
    pairs = [(_json_object(r.text), _json_object(t)) for r, t in _pairs(responses, ground_truths)]
    return [
        Ratio(response is not None and response.keys() == expected.keys(), 1) if expected else Ratio(0, 0)
        for response, expected in pairs
    ]


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def truncated(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Truncation rate: responses truncated at the token limit."""
    return _rate([response.hit_limit for response in responses])


def num_tokens(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Tokens per response, the cost of generating it."""
    return [Ratio(response.tokens, 1) for response in responses]


def num_words(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Words per response. A large change shows that a model improved by shorter or by longer responses."""
    return [Ratio(len(response.text.split()), 1) for response in responses]


def explain_repetition(response: Response, ground_truth: str) -> Explanation:
    """Describe the loop at the end of a response, with its position, unless the ground truth ends in it too."""
    loop = find_repetition(response.text)
    if loop is None or ground_truth.strip().endswith(response.text.strip()[loop.start :]):
        return Explanation("truncated at the token limit" if response.hit_limit else "")
    unit = response.text[loop.start : loop.start + loop.period]
    at_limit = ", truncated at the token limit" if response.hit_limit else ""
    return Explanation(f"{unit!r} x {loop.repeats} at the end{at_limit}", ((loop.start, len(response.text)),))


def correct_repetition(response: Response, ground_truth: str) -> str:
    """Replace the loop of a response from its second repeat on with the rest of the ground truth.

    The ground truth is continued after the prefix that is most similar to the response before that point. Without a
    loop, the ground truth is returned.
    """
    loop = find_repetition(response.text)
    if loop is None:
        return ground_truth
    prefix = response.text[: loop.start + loop.period]
    lengths = range(max(0, len(prefix) - RESUME_WINDOW), min(len(ground_truth), len(prefix) + RESUME_WINDOW) + 1)
    return prefix + ground_truth[min(lengths, key=lambda n: Levenshtein.distance(prefix, ground_truth[:n])) :]


def _pairs(responses: Sequence[Response], ground_truths: Sequence[str]) -> zip[tuple[Response, str]]:
    return zip(responses, ground_truths, strict=True)


def _rate(hits: Sequence[bool]) -> list[Ratio]:
    return [Ratio(float(hit), 1) for hit in hits]
