"""GenEval's rules on detected objects, by hand, and files of detections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpo_mm.judges import judge_card, load_judge
from dpo_mm.judges.benchmarks.geneval import DescribedImage, Detection, counted_objects, is_correct, relations

BENCH = {
    "tag": "colors",
    "include": [{"class": "bench", "count": 1, "color": "red"}],
    "prompt": "a photo of a red bench",
}
TWO = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
BELOW = {"include": [{"class": "kite", "count": 1}, {"class": "bird", "count": 1, "position": ["below", 0]}]}


def thing(x: float = 0, y: float = 0, *, size: float = 10, score: float = 0.95, color: str = "red") -> Detection:
    return Detection((x, y, x + size, y + size), score, color)


def test_number_colour_and_position() -> None:
    dogs = [thing(20.0 * n) for n in range(3)]
    assert [is_correct({"dog": dogs[:n]}, TWO) for n in range(4)] == [False, False, True, False]
    assert is_correct({"bench": [thing()], "cat": [thing()]}, BENCH)
    assert not is_correct(
        {"bench": [thing(color="blue"), thing(score=0.5)]}, BENCH
    )  # only the most confident bench counts
    assert is_correct({"kite": [thing()], "bird": [thing(y=40)]}, BELOW)
    assert not is_correct({"kite": [thing(y=40)], "bird": [thing()]}, BELOW)
    assert not is_correct({"bird": [thing(y=40)]}, BELOW)


def test_relations_need_more_than_the_overlap() -> None:
    # Sizes of 10 and 10: the first 2 pixels of the distance do not count.
    assert relations(thing(-1.9), thing()) == set() == relations(thing(), thing())
    assert (
        relations(thing(-4.1), thing()) == {"left of"} and relations(thing(-3.9), thing()) == set()
    )  # 2 / 4 is not above 1/2
    assert relations(thing(30, 30), thing()) == {"right of", "below"} and relations(thing(y=-30), thing()) == {"above"}


def test_objects_count_from_their_confidence_on() -> None:
    dogs = [thing(score=score) for score in (0.3, 0.91, 0.31, 0.9)]
    line = lambda tag, several: DescribedImage("a.png", {"tag": tag}, {"dog": several}, None)
    assert [each.score for each in counted_objects(line("colors", dogs))["dog"]] == [0.91, 0.9, 0.31]
    assert [each.score for each in counted_objects(line("counting", dogs))["dog"]] == [0.91]
    assert len(counted_objects(line("colors", [thing()] * 20))["dog"]) == 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(2):
        Image.new("RGB", (8, 6), (n, 0, 0)).save(tmp_path / f"{n}.png")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "detections.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"geneval@{folder / 'detections.jsonl'}"


def test_judge_of_detections_and_of_published_results(folder: Path) -> None:
    red = {"bench": [{"box": [0, 0, 5, 5], "score": 0.9, "color": "red"}]}
    published = {"metadata": json.dumps(BENCH), "details": json.dumps({"bench": [[0, 0, 5, 5, 0.9]]}), "correct": False}
    judge = write(folder, {"filename": "0.png", "metadata": BENCH, "objects": red}, {"filename": "1.png", **published})
    images = [Image.open(folder / f"{n}.png") for n in range(2)]
    assert load_judge(judge)(images, [BENCH["prompt"]] * 2) == [1, 0]
    assert len(judge_card(judge)["detections"]) == 64
    with pytest.raises(ValueError, match="no line describes this image of the prompt 'another'"):
        load_judge(judge)(images[:1], ["another"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"objects": {"bench": [[0, 0, 5]]}}, "line 1: .*Expected filename, GenEval's metadata and objects by class"),
        ({"metadata": {"tag": "colors"}, "objects": {}}, "line 1: 'include' is missing"),
        ({"metadata": {**BENCH, "include": BELOW["include"][1:]}, "objects": {}}, "placed next to object 0"),
    ],
)
def test_broken_lines_are_named(row: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_judge(write(folder, {"filename": "0.png", "metadata": BENCH, **row}))


def test_missing_colours_images_and_files_are_named(folder: Path) -> None:
    plain = {"metadata": BENCH, "objects": {"bench": [[0, 0, 5, 5, 0.9]]}}
    image = [Image.open(folder / "0.png")]
    with pytest.raises(ValueError, match=r"0\.png has objects without a color"):
        load_judge(write(folder, {"filename": "0.png", **plain}))(image, [BENCH["prompt"]])
    (folder / "more").mkdir()
    with pytest.raises(ValueError, match=r"image gone\.png cannot be read"):
        load_judge(write(folder / "more", {"filename": "gone.png", **plain}))(image, [BENCH["prompt"]])
    with pytest.raises(ValueError, match=r"no such file\. Expected JSON lines"):
        load_judge(f"geneval@{folder / 'none.jsonl'}")
