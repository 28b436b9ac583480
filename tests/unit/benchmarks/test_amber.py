"""AMBER: files as published, and counts by hand with a small part of its word lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.judges import JUDGES, Ratio, judge_card, load_judge
from dpo_mm.judges.benchmarks.amber import find_mentions, read_word_lists
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
    return load_judge(f"amber_{name}@{data}")([Response(text, 1, hit_limit=False)], [truth])[0]


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
    assert set(judge_card(f"amber_cog@{data}")["word_lists"]) == {"relation.json", "safe_words.txt"}
    assert sum(name.startswith("amber_") for name in JUDGES) == 4


def test_mentions_are_singular_and_have_their_case(data: Path) -> None:
    vocabulary = read_word_lists(data).vocabulary
    assert find_mentions("Mountains, glasses of people and men", vocabulary) == ["glass", "people", "man"]


def test_broken_files_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the folder of AMBER's word lists\. Write amber_hal@AMBER/data"):
        load_judge("amber_hal")
    with pytest.raises(ValueError, match=r"relation\.json: no such file\. Give the folder"):
        load_judge(f"amber_hal@{tmp_path}")
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
