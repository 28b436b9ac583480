"""Sources of rows with one image or response each: captioned folders, chats, and liked and disliked rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.data.schema import load_pairs, load_responses
from dpo_mm.doctor import examine
from dpo_mm.doctor.doctor_report import load_examples, render
from dpo_mm.sources.importing import ImportResult, import_set
from tests.unit.sources.test_sources import grey, write_images


def run(source: str, tmp_path: Path, part: str = "set") -> tuple[ImportResult, list[dict[str, Any]]]:
    result = import_set(source, str(tmp_path / part), str(tmp_path / "out"))
    load = load_pairs if source.endswith("images") else load_responses
    return result, list(load(str(tmp_path / "out")).with_format("arrow")[:].to_pylist())


def json_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(rows: list[dict[str, Any]], side: str) -> list[str | None]:
    return [row[side] and row[side][0]["content"][0]["text"] for row in rows]


def test_folder_of_images_with_caption_files(tmp_path: Path) -> None:
    """An image without a caption is counted and not imported. The doctor checks the rest."""
    write_images(tmp_path / "set", "10.jpg", "deep/20.jpg", "30.jpg")
    (tmp_path / "set" / "10.txt").write_text("a red dot\n")
    (tmp_path / "set" / "deep" / "20.txt").write_text("a blue dot")
    result, rows = run("captioned-images", tmp_path)
    found = [(row["id"], row["prompt"], grey(row["image_a"]), row["image_b"], row["preference"]) for row in rows]
    assert found == [("10.jpg", "a red dot", 10, None, "a"), ("deep/20.jpg", "a blue dot", 20, None, "a")]
    assert result.left_out == {"it has no caption": 1} and result.preferences == {"liked or chosen": 2}
    diagnosis = examine(str(tmp_path / "out"))
    assert diagnosis.facts["rows with one side"].startswith("2 liked or chosen.") and diagnosis.kind == "images"
    assert "undecodable-images" in diagnosis.passed and "duplicate-pairs" not in diagnosis.passed
    assert {finding.check for finding in diagnosis.findings} == {"licence-missing"}
    assert "does not decode<" not in render(diagnosis, load_examples(diagnosis), command="doctor")


def test_folder_of_images_with_metadata(tmp_path: Path) -> None:
    """Hugging Face's imagefolder, with its folder of a split. A `label` of a class is not a liking."""
    write_images(tmp_path / "set" / "train", "10.jpg", "20.jpg")
    lines = [{"file_name": f"{n}.jpg", "text": f"dot {n}", "label": 3, "liked": n == 10} for n in (10, 20)]
    json_lines(tmp_path / "set" / "train" / "metadata.jsonl", *lines)
    _, rows = run("captioned-images", tmp_path)
    found = [(row["prompt"], grey(row["image_a"]), row["preference"]) for row in rows]
    assert found == [("dot 10", 10, "a"), ("dot 20", 20, "b")]
    write_images(tmp_path / "bare", "1.jpg")
    with pytest.raises(ValueError, match=r"bare: no captions for its 1 images. Expected a text file of the same name"):
        import_set("captioned-images", str(tmp_path / "bare"), str(tmp_path / "none"))


def test_chats_become_rows_with_a_chosen_response(tmp_path: Path) -> None:
    """The last turn of the assistant is the response, also of ShareGPT, and images may be inside the messages."""
    write_images(tmp_path / "set", "10.jpg", "20.jpg")
    answer = [{"role": "assistant", "content": "A dot."}]
    question = {"role": "user", "content": [{"type": "image", "path": "10.jpg"}, {"type": "text", "text": "What?"}]}
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Two."}]
    json_lines(
        tmp_path / "set" / "train.jsonl",
        {
            "messages": [
                question,
                *answer,
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ]
        },
        {"messages": turns, "images": ["20.jpg"], "kto_tag": False},
        {"messages": [{"role": "user", "content": "Hello"}]},
    )
    result, rows = run("chat", tmp_path)
    assert texts(rows, "chosen") == ["Yes.", None] and texts(rows, "rejected") == [None, "Two."]
    assert [message["role"] for message in rows[0]["prompt"]] == ["user", "assistant", "user"]
    assert [grey(row["images"][0]) for row in rows] == [10, 20]
    assert result.left_out == {"it has no response of the assistant": 1}
    diagnosis = examine(str(tmp_path / "out"))
    assert diagnosis.facts["rows with one side"].startswith("1 liked or chosen, 1 disliked")
    assert {finding.check for finding in diagnosis.findings} == {"licence-missing"}


def test_rows_of_prompt_completion_and_label(tmp_path: Path) -> None:
    """TRL's unpaired and prompt-completion formats, a CSV file with texts as booleans, and a cell that is neither."""
    lines = [{"prompt": "p", "completion": f"c{n}", "label": n > 0} for n in range(2)]
    json_lines(tmp_path / "kto" / "train.jsonl", *lines)
    _, rows = run("trl", tmp_path, "kto")
    assert texts(rows, "chosen") == [None, "c1"] and texts(rows, "rejected") == ["c0", None]
    (tmp_path / "csv").mkdir()
    write_images(tmp_path / "csv", "10.jpg")
    for name, label in (("train", "FALSE"), ("wrong", "maybe")):
        with (tmp_path / "csv" / f"{name}.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerows([["prompt", "completion", "image", "label"], ["What?", "A dot.", "10.jpg", label]])
    import_set("custom-responses", str(tmp_path / "csv" / "train.csv"), str(tmp_path / "two"))
    row = load_responses(str(tmp_path / "two"))[0]
    assert row["chosen"] is None and row["rejected"] is not None and len(row["images"]) == 1
    with pytest.raises(ValueError, match=r"wrong.csv, row 0: label is 'maybe'. Expected true or false"):
        import_set("custom-responses", str(tmp_path / "csv" / "wrong.csv"), str(tmp_path / "three"))


def test_custom_table_of_liked_images(tmp_path: Path) -> None:
    write_images(tmp_path / "set", "10.jpg", "20.jpg")
    lines = [{"prompt": f"p{n}", "image": f"{n}.jpg", "liked": n == 20, "source": "me"} for n in (10, 20)]
    json_lines(tmp_path / "set" / "train.jsonl", *lines)
    result, rows = run("custom-images", tmp_path)
    assert [(grey(row["image_a"]), row["preference"], row["source"]) for row in rows] == [
        (10, "b", "me"),
        (20, "a", "me"),
    ]
    assert result.preferences == {"disliked": 1, "liked or chosen": 1}
