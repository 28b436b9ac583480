"""Judges of descriptions by the rules of AMBER, with the word lists that it publishes.

    amber_chair@AMBER/data    amber_cover@AMBER/data    amber_hal@AMBER/data    amber_cog@AMBER/data

A mention is a word of AMBER's vocabulary (relation.json) in singular or plural. A mention is right if it is an object of the
image or associated with one. Safe words (safe_words.txt) are never wrong. Every other mention is hallucinated.

The published code finds nouns with NLTK's tagger and WordNet, and also accepts words whose spaCy vectors are similar to a right
one. Here each word of the vocabulary counts, whatever part of speech it is, and similar words are not accepted. So CHAIR and
Hal are usually higher here, and Cover and Cog lower. Compare only numbers of the same judge.

Source: Wang et al. 2023 (2311.07397), github.com/junyangwang0410/AMBER (Apache-2.0), inference.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_mm.data.schema import Response
from dpo_mm.data.text_files import read_lines, read_text
from dpo_mm.errors import one_line
from dpo_mm.judges import JudgeName, LazyJudge, Ratio
from dpo_mm.judges.weights import sha256

RELATIONS, SAFE_WORDS = "relation.json", "safe_words.txt"
WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*")
ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
"""Endings of plurals and of their singulars, as in WordNet."""
IRREGULAR = {
    "children": "child",
    "geese": "goose",
    "knives": "knife",
    "leaves": "leaf",
    "mice": "mouse",
    "scarves": "scarf",
    "shelves": "shelf",
    "bookshelves": "bookshelf",
}


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
    if name.model or not name.location:
        raise ValueError(f"judge {name.judge!r} needs the folder of AMBER's word lists. Write {name.judge}@AMBER/data")
    folder = Path(name.location).expanduser()
    lists = read_word_lists(folder)

    def judge(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
        pairs = zip(responses, ground_truths, strict=True)
        counts = [count_mentions(response.text, truth, lists) for response, truth in pairs]
        return [ratio(each) if each else Ratio(0, 0) for each in counts]

    def card() -> dict[str, Any]:
        return {
            "model": "word lists of AMBER",
            "word_lists": {file: sha256(folder / file) for file in (RELATIONS, SAFE_WORDS)},
        }

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


def count_mentions(text: str, ground_truth: str, lists: WordLists) -> Counts | None:
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
    mentions = find_mentions(text, lists.vocabulary)
    unsafe = [word for word in mentions if word not in lists.safe]
    wrong = [word for word in unsafe if word not in right]
    covered = {right[word] for word in unsafe if word in right}
    invented = {expected[word] for word in wrong if word in expected}
    return Counts(len(wrong), len(mentions), len(covered), len(truth), len(invented), len(listed))


def _owners(objects: Sequence[str], lists: WordLists) -> dict[str, int]:
    """Return which object each associated word, or the object's own word, counts for: the first one."""
    words = [(other, number) for number, word in enumerate(objects) for other in lists.relations[word]]
    words += [(word, number) for number, word in enumerate(objects)]
    return {word: number for word, number in reversed(words)}


def find_mentions(text: str, vocabulary: frozenset[str]) -> list[str]:
    """Find the words of the vocabulary in a text, in singular. Words with capitals count only if the vocabulary has them so."""
    mentions = []
    for word in WORD.findall(text):
        singulars = [word.removesuffix(plural) + singular for plural, singular in ENDINGS if word.endswith(plural)]
        known = sorted({IRREGULAR.get(word, word), *(singulars if word not in IRREGULAR else ())} & vocabulary, key=len)
        mentions += known[:1]
    return mentions
