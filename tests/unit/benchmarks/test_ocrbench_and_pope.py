"""OCRBench and POPE: files as published, and the published rules by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import Response
from dpo_mm.judges import load_judge

OCRBENCH = [
    {
        "dataset_name": "ctw",
        "id": 54,
        "image_path": "ctw/imgs/000000055.jpg",
        "question": "what is written in the image?",
        "answers": ["ANTONIOS", "ANTONIO'S"],
        "type": "Irregular Text Recognition",
    },
    {
        "dataset_name": "HME100k",
        "id": 14413,
        "image_path": "HME100K/test/test_images/test_17522.jpg",
        "question": "Please write out the expression of the formula in the image using LaTeX format.",
        "answers": ["y _ { 2 } = - 1\n", "y_2 = - 1\n"],
        "type": "Handwritten Mathematical Expression Recognition",
    },
]
POPE = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a snowboard in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a car in the image?", "label": "no"},
]


def save_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / name)


def hits(judge: str, text: str, truths: tuple[str, ...]) -> float:
    response = Response(text, 1, hit_limit=False)
    return max(load_judge(judge)([response], [truth])[0].hits for truth in truths)


def test_ocrbench_file_as_published(tmp_path: Path) -> None:
    (tmp_path / "OCRBench.json").write_text(json.dumps(OCRBENCH, indent=4))
    save_images(tmp_path / "OCRBench_Images", *(row["image_path"] for row in OCRBENCH))
    words, formula = read_questions(str(tmp_path / "OCRBench.json"))
    assert (words.id, words.category, words.images[0].size) == ("ctw-54", "Irregular Text Recognition", (8, 6))
    assert words.ground_truths == ("ANTONIOS", "ANTONIO'S")
    assert hits("ocrbench", "It says\nantonio's.", words.ground_truths) == 1
    assert hits("ocrbench", "ANTONIO S", words.ground_truths) == 0
    # Formulas are compared without spaces and with their case.
    assert (
        hits("ocrbench", "$y_{2}=-1$", formula.ground_truths)
        == 1
        == hits("ocrbench", "y_2\n=-1", formula.ground_truths)
    )
    assert hits("ocrbench", "Y_{2}=-1", formula.ground_truths) == 0


def test_pope_file_as_published_and_its_judges(tmp_path: Path) -> None:
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, POPE)))
    save_images(tmp_path / "val2014", "a.jpg")
    yes, no = read_questions(str(tmp_path / "coco_pope_random.json"))
    assert (yes.id, yes.prompt, no.ground_truth) == ("1", "Is there a snowboard in the image?", "no")
    assert (
        hits("pope_accuracy", "Yes, there is.", yes.ground_truths) == 1 == hits("pope_accuracy", "No", no.ground_truths)
    )


def test_benchmark_files_that_are_broken_are_named(tmp_path: Path) -> None:
    file = tmp_path / "OCRBench.json"
    file.write_text(json.dumps(OCRBENCH))
    with pytest.raises(ValueError, match=r"OCRBench\.json: image ctw/imgs/000000055\.jpg is not in .*Copy the images"):
        read_questions(str(file))
    save_images(tmp_path, OCRBENCH[0]["image_path"])
    file.write_text(json.dumps([OCRBENCH[0], {"id": 3}]))
    with pytest.raises(ValueError, match=r"OCRBench\.json, row 1: no answers, which rows of OCRBench have"):
        read_questions(str(file))
    file.write_text(json.dumps([{**OCRBENCH[0], "image_path": "/etc/hostname"}]))
    with pytest.raises(ValueError, match="leads out of the folder of the dataset"):
        read_questions(str(file))
