from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash
from datasets import Dataset
from PIL import Image

from dpo_mm.data import lazy_images
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.questions import read_questions

RED = Image.new("RGB", (8, 6), "#ff0000")


def test_read_questions_synthetic_splits_have_different_ground_truths() -> None:
    train, held_out = read_questions("pages-train", limit=5), read_questions("pages-held-out", limit=5)
    assert len(train) == len(held_out) == 5 and train[0].images[0].size == (80, 80)
    assert not {one.ground_truth for one in train} & {one.ground_truth for one in held_out}
    scene = read_questions("scenes-held-out", limit=1)[0]
    assert scene.ground_truth.endswith(".") and scene.category in ("1 thing", "2 things", "3 things", "4 things")


def test_read_questions_json_lines_image_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    RED.save(tmp_path / "pictures" / "a.png")
    rows = [
        {"image": "pictures/a.png", "prompt": "What colour?", "ground_truth": "red", "category": "colour"},
        {"images": ["pictures/a.png", "pictures/a.png"], "prompt": "The same?", "id": "two"},
        {"prompt": "No image."},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    one, two, three = read_questions(str(tmp_path / "q.jsonl"))
    assert (one.id, one.ground_truth, one.category) == ("0", "red", "colour") and one.images[0].getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    assert two.id == "two" and len(two.images) == 2 and two.ground_truth == ""
    assert three.images == ()
    assert len(read_questions(str(tmp_path / "q.jsonl"), limit=2)) == 2


def test_read_questions_parquet_contains_image_bytes(tmp_path: Path) -> None:
    rows = {"prompt": ["Read."], "ground_truth": ["abc"], "images": [[{"bytes": encode_png(RED), "path": None}]]}
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "q.parquet"))
    (question,) = read_questions(str(tmp_path / "q.parquet"))
    assert question.images[0].size == (8, 6) and question.ground_truth == "abc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "line 1: not JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"ground_truth": "x"}', "row 0: no prompt"),
        ('{"prompt": "x", "image": "gone.png"}', "row 0: image gone.png cannot be read"),
        ("", "no questions in the file"),
    ],
)
def test_read_questions_bad_file_names_the_row_and_the_fix(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_images_are_decoded_when_they_are_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = lazy_images.rgb_image
    monkeypatch.setattr(lazy_images, "rgb_image", lambda cell: decoded.append(1) or decode(cell))
    for n in range(3):
        Image.new("RGB", (8, 6 + n)).save(tmp_path / f"{n}.png")
    if kind == "jsonl":
        lines = [json.dumps({"prompt": "Read.", "images": [f"{n}.png"]}) for n in range(3)]
        (tmp_path / "q.jsonl").write_text("\n".join(lines))
    else:
        cells = [[{"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None}] for n in range(3)]
        Dataset.from_dict({"prompt": ["Read."] * 3, "images": cells}).to_parquet(str(tmp_path / "q.parquet"))
    questions = read_questions(str(tmp_path / f"q.{kind}"))
    files = [xxhash.xxh3_128_hexdigest((tmp_path / f"{n}.png").read_bytes()) for n in range(3)]
    assert [list(question.content["images"]) for question in questions] == [[file] for file in files] and not decoded
    assert [question.images[0].height for question in questions] == [6, 7, 8] and len(decoded) == 3


def test_image_that_is_damaged_after_its_header_is_named_when_it_is_used(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-500])
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "Read.", "image": "a.png"}))
    (question,) = read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match=r"q.jsonl, row 0: image a.png cannot be read \("):
        question.images[0]


def test_read_questions_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'pages-train'"):
        read_questions("pages-trian")


@pytest.mark.parametrize(
    ("cell", "truths"),
    [
        (["25th June", "June 25"], ("25th June", "June 25")),
        (0, ("0",)),
        ([1, "one"], ("1", "one")),
        ("", ("",)),
        (False, ("false",)),
        ({"sum": 3.5}, ('{"sum": 3.5}',)),
        (None, None),
        ([], None),
    ],
)
def test_ground_truths_have_their_type(cell: object, truths: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Catches the text of a Python list, 0 or an empty page as unknown, and null as known."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "when?", "ground_truth": cell}))
    (question,) = read_questions(str(path))
    assert question.has_ground_truth == (truths is not None) and question.ground_truths == (truths or ("",))


def test_ground_truth_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "when?", "ground_truth": ["one", null]}')
    with pytest.raises(ValueError, match=r"q.jsonl, row 0: ground_truth is \['one', None\]. Expected a text"):
        read_questions(str(tmp_path / "q.jsonl"))


def test_rendered_image_that_a_caller_changes_is_rendered_again() -> None:
    """It catches a changed image that the next use would get."""
    (question, *_) = read_questions("pages-train", limit=2)
    first = question.images[0]
    before = first.tobytes()
    first.paste((0, 0, 0), (0, 0, *first.size))
    assert question.images[0].tobytes() == before != first.tobytes()
