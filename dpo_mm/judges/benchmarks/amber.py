"""Judges of descriptions by the rules of AMBER, with the word lists that it publishes.

    amber_chair@AMBER/data          amber_cover, amber_hal and amber_cog alike: the published rule
    amber_chair_words@AMBER/data    amber_cover_words, amber_hal_words and amber_cog_words alike: word lists alone

A mention is a noun of AMBER's vocabulary (relation.json). It is right if it is an object of the image, or associated with one, or
similar to one of these words. Safe words (safe_words.txt) are never wrong. Every other mention is hallucinated.

The published rule needs data of NLTK and a spaCy model. Without them, each word of the vocabulary counts, whatever part of speech
it is, and similar words are not right. So CHAIR and Hal are usually higher, and Cover and Cog lower. Compare only numbers of
the same judge.

Source: Wang et al. 2023 (2311.07397), github.com/junyangwang0410/AMBER (Apache-2.0), inference.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.data.schema import Response
from dpo_mm.data.text_files import read_lines, read_text
from dpo_mm.errors import one_line
from dpo_mm.judges import JudgeName, LazyJudge, Ratio
from dpo_mm.judges.benchmarks.amber_words import Words, listed_words, published_words
from dpo_mm.judges.weights import sha256

RELATIONS, SAFE_WORDS = "relation.json", "safe_words.txt"
published = functools.cache(published_words)
"""The model is opened once for all judges."""


class WordLists(NamedTuple):
    """Word lists of AMBER.

    Attributes:
        relations: words associated with each object.
        vocabulary: all words of the relations.
        safe: words that are never hallucinated.
    """

    relations: dict[str, list[str]]
    vocabulary: frozenset[str]
    safe: frozenset[str]


class Counts(NamedTuple):
    """Counts of one description.

    Attributes:
        hallucinated, mentioned: hallucinated mentions, and all mentions.
        covered, present: objects of the image that are mentioned, and all of them.
        expected, listed: hallucinations that models like to make here and that are made, and all that are listed.
    """

    hallucinated: int
    mentioned: int
    covered: int
    present: int
    expected: int
    listed: int


def amber_chair(name: JudgeName) -> LazyJudge:
    """CHAIR: hallucinated mentions, as a fraction of all mentions."""
    return _judge(name, lambda counts: Ratio(counts.hallucinated, counts.mentioned))


def amber_cover(name: JudgeName) -> LazyJudge:
    """Cover: objects of the image that are mentioned."""
    return _judge(name, lambda counts: Ratio(counts.covered, counts.present))


def amber_hal(name: JudgeName) -> LazyJudge:
    """Hal: descriptions with a hallucinated mention."""
    return _judge(name, lambda counts: Ratio(float(counts.hallucinated > 0), 1))


def amber_cog(name: JudgeName) -> LazyJudge:
    """Cog: listed hallucinations that are made."""
    return _judge(name, lambda counts: Ratio(counts.expected, counts.listed))


def _judge(name: JudgeName, ratio: Callable[[Counts], Ratio]) -> LazyJudge:
    by_lists = name.judge.endswith("_words")
    if (name.model and by_lists) or not name.location:
        raise ValueError(f"judge {name.judge!r} needs the folder of AMBER's word lists. Write {name.judge}@AMBER/data")
    folder = Path(name.location).expanduser()
    lists = read_word_lists(folder)
    try:
        words = listed_words() if by_lists else published(name.model)
    except ValueError as error:
        raise ValueError(f"judge {name.judge!r}: {error}. {name.judge}_words needs AMBER's word lists only") from None

    def judge(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
        pairs = zip(responses, ground_truths, strict=True)
        counts = [count_mentions(response.text, truth, lists, words) for response, truth in pairs]
        return [ratio(each) if each else Ratio(0, 0) for each in counts]

    def card() -> dict[str, Any]:
        return {**words.card, "word_lists": {file: sha256(folder / file) for file in (RELATIONS, SAFE_WORDS)}}

    return LazyJudge(judge, card)


def read_word_lists(folder: Path) -> WordLists:
    """Read AMBER's word lists.

    Raises:
        ValueError: if a file is missing or not as published. It names the file.
    """
    for file in (RELATIONS, SAFE_WORDS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: no such file. Give the folder `data` of AMBER's repository")
    try:
        relations: dict[str, list[str]] = {
            word: [str(other) for other in others] for word, others in json.loads(read_text(folder / RELATIONS)).items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / RELATIONS}: not as published ({one_line(error)}). Copy it again") from None
    vocabulary = frozenset(relations).union(*relations.values())
    return WordLists(relations, vocabulary, frozenset(read_lines(folder / SAFE_WORDS)))


def count_mentions(text: str, ground_truth: str, lists: WordLists, words: Words) -> Counts | None:
    """Count the mentions of a description. None if the ground truth is yes or no, not that of a description."""
    if not ground_truth.startswith("{"):
        return None
    try:
        objects = json.loads(ground_truth)
        truth, listed = ([str(word) for word in objects[name]] for name in ("truth", "hallu"))
        right, expected = _owners(truth, lists), _owners(listed, lists)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"ground truth {ground_truth[:60]!r} does not fit AMBER's word lists ({one_line(error)}). Use its files as published"
        ) from None
    mentions = words.find(text, lists.vocabulary)
    covered, invented, hallucinated = set(), set(), 0
    for word in mentions:
        if word in lists.safe:
            continue
        if word in right:
            covered.add(right[word])
            continue
        # A word can be listed as a hallucination and be similar to another one: both count.
        invented |= {expected[word]} if word in expected else set()
        invented |= _similar_owner(word, expected, words)
        similar = _similar_owner(word, right, words)
        covered |= similar
        hallucinated += not similar
    return Counts(hallucinated, len(mentions), len(covered), len(truth), len(invented), len(listed))


def _owners(objects: Sequence[str], lists: WordLists) -> dict[str, int]:
    """Return which object each associated word, or the object's own word, counts for: the first one."""
    words = [(other, number) for number, word in enumerate(objects) for other in lists.relations[word]]
    words += [(word, number) for number, word in enumerate(objects)]
    owners: dict[str, int] = {}
    for word, number in words:
        owners.setdefault(word, number)
    return owners


def _similar_owner(word: str, owners: dict[str, int], words: Words) -> set[int]:
    """The object of the first similar word, if there is one."""
    first = next((owner for other, owner in owners.items() if words.similar(word, other)), None)
    return set() if first is None else {first}
