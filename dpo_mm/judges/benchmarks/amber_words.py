"""Words of descriptions as AMBER's judges find and compare them: by its published code, or by its word lists alone.

The published code takes the nouns that NLTK's tagger finds, in WordNet's singular, and compares words by the similarity of their
spaCy vectors. Nothing is downloaded: without the data of both on the machine, these judges are refused.

Source: Wang et al. 2023 (2311.07397), github.com/junyangwang0410/AMBER (Apache-2.0), inference.py.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.errors import one_line

SPACY_MODEL = "en_core_web_lg"
NLTK_DATA = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")
MIN_SIMILARITY = 0.8
"""Words are similar above this cosine."""
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


class Words(NamedTuple):
    """A way to find and to compare words.

    Attributes:
        find: (text, vocabulary) -> mentions, the words of the text that the vocabulary has.
        similar: if one word counts for the other, beyond equality.
        card: what a judge's card says of them.
    """

    find: Callable[[str, frozenset[str]], list[str]]
    similar: Callable[[str, str], bool]
    card: dict[str, Any]


def listed_words() -> Words:
    """Words of the vocabulary in singular or plural, of which none is similar to another."""
    return Words(find_listed, lambda word, other: False, {"model": "word lists of AMBER"})


def find_listed(text: str, vocabulary: frozenset[str]) -> list[str]:
    """Find the words of the vocabulary in a text, in singular. Words with capitals count only if the vocabulary has them so."""
    mentions = []
    for word in WORD.findall(text):
        singulars = [word.removesuffix(plural) + singular for plural, singular in ENDINGS if word.endswith(plural)]
        known = sorted({IRREGULAR.get(word, word), *(singulars if word not in IRREGULAR else ())} & vocabulary, key=len)
        mentions += known[:1]
    return mentions


def published_words(model: str = "") -> Words:
    """Nouns by NLTK, and similarity by a spaCy model.

    Args:
        model: name or folder of a spaCy model with vectors. The published one is en_core_web_lg.

    Raises:
        ValueError: if data of NLTK or the model is missing. It names the commands that install them.
    """
    nltk, model = import_extra("nltk", "nltk", extra="amber"), model or SPACY_MODEL
    lemmatizer = import_extra("nltk.stem", "nltk", extra="amber").WordNetLemmatizer()

    def find(text: str, vocabulary: frozenset[str]) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        nouns = [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]
        return [noun for noun in nouns if noun in vocabulary]

    try:
        find("Two dogs.", frozenset())
    except LookupError:
        raise ValueError(
            f"data of NLTK is missing ({', '.join(NLTK_DATA)}). Run python -m nltk.downloader {' '.join(NLTK_DATA)}"
        ) from None
    language = _spacy_model(model)
    document = functools.cache(language.make_doc)

    @functools.cache
    def similar(word: str, other: str) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a word without a vector is similar to none
            return bool(document(word).similarity(document(other)) > MIN_SIMILARITY)

    card = {
        "model": f"{language.meta['lang']}_{language.meta['name']} {language.meta['version']}",
        "similarity": MIN_SIMILARITY,
    }
    return Words(find, similar, card | {library: importlib.metadata.version(library) for library in ("nltk", "spacy")})


def _spacy_model(model: str) -> Any:
    spacy = import_extra("spacy", "spacy", extra="amber")
    try:
        language = spacy.load(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"spaCy cannot load {model} ({one_line(error)[:120]}). Run python -m spacy download {model}"
        ) from None
    if not language.vocab.vectors.n_keys:
        raise ValueError(f"the spaCy model {model} has no vectors. Use {SPACY_MODEL}, as the published code does")
    return language
