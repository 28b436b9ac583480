"""AMBER: files as published, and counts by hand with a small part of its word lists."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.judges import JUDGES, Ratio, judge_card, load_judge, metric_of
from dpo_mm.judges.benchmarks.amber import count_mentions, read_word_lists
from dpo_mm.judges.benchmarks.amber_words import Words, find_listed, published_words
from tests.unit.benchmarks.test_ocrbench_and_pope import save_images

RELATIONS = {
    "sky": [],
    "person": ["people", "man", "child"],
    "mountain": ["hill", "rock"],
    "cloud": [],
    "bird": ["dove"],
    "orange": [],
    "glass": [],
    "sun": [],
}
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["sky", "person", "mountain"], "hallu": ["cloud", "bird"]},
    {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
]
QUERIES = [
    {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
    {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_images(folder / "query" / "image", "AMBER_1.jpg")
    (folder / "relation.json").write_text(json.dumps(RELATIONS))
    (folder / "safe_words.txt").write_text("orange\nlight\n")
    (folder / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (folder / "query" / "query_all.json").write_text(json.dumps(QUERIES))
    return folder


def score(name: str, text: str, truth: str, data: Path) -> Ratio:
    return load_judge(f"amber_{name}_words@{data}")([Response(text, 1, hit_limit=False)], [truth])[0]


def test_files_as_published_and_counts_by_hand(data: Path) -> None:
    description, question = read_questions(str(data / "query" / "query_all.json"))
    assert (description.category, question.ground_truth) == ("generative", "yes")
    # 8 mentions: person three times by associated words, sky, cloud and dove (listed), sun (other), orange (safe).
    text = "Children and a man with an orange hill-top; people under the sky, clouds, doves and the sun. A child."
    truth = description.ground_truth
    assert score("chair", text, truth, data) == Ratio(3, 8)
    assert score("hal", text, truth, data) == Ratio(1, 1) and score("hal", "A sky.", truth, data) == Ratio(0, 1)
    assert score("cover", text, truth, data) == Ratio(2, 3) and score("cover", "a rock", truth, data) == Ratio(1, 3)
    assert score("cog", text, truth, data) == Ratio(2, 2) and score("cog", "the sun", truth, data) == Ratio(0, 2)
    assert score("chair", "yes", question.ground_truth, data) == Ratio(0, 0)
    assert set(judge_card(f"amber_cog_words@{data}")["word_lists"]) == {"relation.json", "safe_words.txt"}
    assert sum(name.startswith("amber_") for name in JUDGES) == 8


def test_mentions_are_singular_and_have_their_case(data: Path) -> None:
    vocabulary = read_word_lists(data).vocabulary
    assert find_listed("Mountains, glasses of people and men", vocabulary) == ["glass", "people", "man"]


def test_similar_words_count_by_hand(data: Path) -> None:
    """The published rule: hand-made nouns, of which two words are similar if they have the same first letter."""
    lists = read_word_lists(data)._replace(safe=frozenset({"orange"}))
    words = Words(lambda text, vocabulary: text.split(), lambda word, other: word[0] == other[0], {})
    count = lambda text: count_mentions(
        text, json.dumps({"truth": ["sky", "person"], "hallu": ["cloud", "bird"]}), lists, words
    )
    assert count("sky people") == (0, 2, 2, 2, 0, 2)
    assert count("sun") == (0, 1, 1, 2, 0, 2)  # similar to sky, so right
    assert count("mountain") == (0, 1, 1, 2, 0, 2)  # similar to man, which counts for person
    assert count("bird") == (1, 1, 0, 2, 1, 2) and count("bus") == (1, 1, 0, 2, 1, 2)  # listed, and similar to listed
    assert count("child cloud") == (0, 2, 1, 2, 1, 2)  # child is right, and cloud is listed and similar to it
    assert count("orange glass") == (1, 2, 0, 2, 0, 2)  # safe, and similar to nothing


class Document(str):
    """A stand-in for spaCy's."""

    def similarity(self, other: str) -> float:
        return {"dove": 0.81, "hill": 0.8}.get(other, 0.0)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stand-ins for NLTK and spaCy with their data."""
    tagged = [("Two", "CD"), ("dogs", "NNS"), ("orange", "JJ"), ("clouds", "NN"), ("cloud", "VB"), ("bird", "NNP")]
    lemmatizer = types.SimpleNamespace(lemmatize=lambda word: word.removesuffix("s"))
    nltk = types.SimpleNamespace(word_tokenize=str.split, pos_tag=lambda words: tagged)
    language = types.SimpleNamespace(
        make_doc=Document,
        vocab=types.SimpleNamespace(vectors=types.SimpleNamespace(n_keys=2)),
        meta={"lang": "en", "name": "a", "version": "1"},
    )
    spacy = types.SimpleNamespace(load={"en_core_web_lg": language}.__getitem__)
    stem = types.SimpleNamespace(WordNetLemmatizer=lambda: lemmatizer)
    for name, module in (("nltk", nltk), ("nltk.stem", stem), ("spacy", spacy)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.metadata.version", lambda library: f"{library} 1")
    return types.SimpleNamespace(nltk=nltk, language=language, spacy=spacy)


def test_published_words(libraries: types.SimpleNamespace, data: Path) -> None:
    words = published_words()
    assert words.find("a text", read_word_lists(data).vocabulary) == ["cloud", "bird"]
    assert [words.similar("bird", other) for other in ("dove", "hill", "sky")] == [True, False, False]
    assert words.card["model"] == "en_a 1" and words.card["spacy"] == "spacy 1"
    assert metric_of("amber_hal:en_core_web_md@data") == "AMBER Hal (en_core_web_md)"


def test_what_the_published_rule_needs_is_named(
    libraries: types.SimpleNamespace, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.language.vocab.vectors.n_keys = 0
    with pytest.raises(ValueError, match="en_core_web_lg has no vectors"):
        published_words()
    libraries.spacy.load = lambda model: Path(model, "no such model").read_text()  # OSError, as spaCy's
    with pytest.raises(ValueError, match=r"Run python -m spacy download other"):
        published_words("other")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"needs spacy, .*pip install 'dpo-mm\[amber\]'"):
        published_words()
    libraries.nltk.word_tokenize = {}.__getitem__  # as NLTK's, it raises LookupError
    with pytest.raises(
        ValueError, match=r"'amber_hal': .*nltk\.downloader punkt_tab .*\. amber_hal_words needs AMBER's"
    ):
        load_judge(f"amber_hal@{data}")


def test_broken_files_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the folder of AMBER's word lists\. Write amber_hal_words@AMBER/data"):
        load_judge("amber_hal_words")
    with pytest.raises(ValueError, match=r"relation\.json: no such file\. Give the folder"):
        load_judge(f"amber_hal_words@{tmp_path}")
    with pytest.raises(ValueError, match=r"'tree' is missing\)\. Use its files as published"):
        score("cog", "a", json.dumps({"truth": ["tree"], "hallu": ["sky"]}), data)
    file = data / "query" / "query_all.json"
    file.write_text(json.dumps([{**QUERIES[0], "id": 7}]))
    with pytest.raises(ValueError, match=r"row 0: id 7 is not in annotations\.json"):
        read_questions(str(file))
    (data / "annotations.json").write_text('[{"id": 1, "type": "generative", "truth": [], "hallu": []}]')
    with pytest.raises(ValueError, match=r"annotations\.json: id 1 has no truth"):
        read_questions(str(file))
    (data / "annotations.json").unlink()
    with pytest.raises(ValueError, match=r"annotations\.json is not in its folder"):
        read_questions(str(file))
