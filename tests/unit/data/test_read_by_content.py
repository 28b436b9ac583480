"""Prompt lists, questions and folders are read by content: each case here was read as something else without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_mm.data import parquet
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.prompts import PromptSpec, read_prompt_set, read_prompts
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import (
    image_preference,
    load_pairs,
    load_responses,
    make_image_rows,
    make_response_rows,
    split_by_prompt,
)
from tests.conftest import noise_image, rows

TWO = ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", json.dumps(TWO, indent=1)),
        ("p.txt", json.dumps(TWO)),
        ("p.json", json.dumps([{"id": n, "prompt": prompt} for n, prompt in enumerate(TWO)], indent=1)),
        ("p.txt", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in TWO)),
        ("p.csv", "id,prompt\n0,a cat\n1,a dog\n"),
        ("p.csv", "Prompt\na cat\na dog\n"),
        ("p.txt", "id,prompt\r\n0,a cat\r\n1,a dog\r\n"),
        ("p.txt", "\ufeffa cat\r\na dog\r\n"),
    ],
)
def test_read_prompts_recognises_the_content(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(str(tmp_path / name)) == TWO


def test_read_prompts_splits_lines_at_newlines_only(tmp_path: Path) -> None:
    """Catches str.splitlines, which splits at U+2028, U+0085 and form feeds."""
    path = tmp_path / "p.txt"
    path.write_text("a\u2028cat\nb\x85c\nd\x0ce\n[a red] circle\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a\u2028cat", "b\x85c", "d\x0ce", "[a red] circle"]


def test_read_prompt_set_csv_has_categories_and_a_table_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('category,prompt\nanimals,"a cat, a dog"\n')
    assert read_prompt_set(str(tmp_path / "p.csv")).prompts == (PromptSpec("a cat, a dog", "animals"),)
    (tmp_path / "q.csv").write_text("text,label\na cat,1\n")
    with pytest.raises(ValueError, match=r"columns text, label\. Expected a column prompt"):
        read_prompts(str(tmp_path / "q.csv"))


def test_read_questions_takes_lists_and_keeps_zero_as_ground_truth(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"prompt": "how many?", "ground_truth": 0},
        {"prompt": "read\u2028it", "ground_truth": ""},
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries, indent=1))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    for name in ("q.json", "q.jsonl"):
        questions = read_questions(str(tmp_path / name))
        assert [str(vars(question).get("ground_truth", vars(question).get("truth"))) for question in questions] == [
            "0",
            "",
        ]
        assert questions[1].prompt == "read\u2028it"


def test_load_pairs_reads_the_train_split_of_a_folder(tmp_path: Path) -> None:
    for split, ids in (("train-00000-of-00002", "ab"), ("train-00001-of-00002", "c"), ("test-00000-of-00001", "d")):
        some = [{**row, "id": name} for row, name in zip(rows(len(ids)), ids, strict=True)]
        make_image_rows(some).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert load_pairs(str(tmp_path))["id"] == ["a", "b", "c"]
    for path in tmp_path.glob("train-*"):
        path.rename(path.with_name(path.name.replace("train", "validation")))
    with pytest.raises(ValueError, match=r"several splits \(test, validation\) and none is train"):
        load_pairs(str(tmp_path))


def test_split_by_prompt_keeps_an_image_on_one_side(tmp_path: Path) -> None:
    """Catches a split by file name or by question: the same image under two of them leaks into the evaluation."""
    images = [encode_png(noise_image(n)) for n in range(20)]
    some = [
        {
            "images": [{"bytes": images[n // 2], "path": f"{n}.png"}],
            "prompt": f"question {n}?",
            "chosen": "yes",
            "rejected": "no",
        }
        for n in range(40)
    ]
    train, held_out = split_by_prompt(make_response_rows(some), 0.3, seed=0)
    assert held_out is not None and len(held_out) == 12
    sides = [
        {int(message[0]["content"][0]["text"].split()[1][:-1]) // 2 for message in part["prompt"]}
        for part in (train, held_out)
    ]
    assert not sides[0] & sides[1]


def test_split_by_prompt_links_rows_over_shared_images() -> None:
    """a and b share an image, b and c another one: all three are one group, and d is another."""
    images = [{"bytes": encode_png(noise_image(n)), "path": None} for n in range(4)]
    lists = [[images[0]], [images[0], images[1]], [images[1], images[2]], [images[3]]]
    some = [
        {"images": cell, "prompt": "what?", "chosen": "yes", "rejected": "no", "id": name}
        for cell, name in zip(lists, "abcd", strict=True)
    ]
    for seed in range(4):
        train, held_out = split_by_prompt(make_response_rows(some), 0.5, seed=seed)
        assert held_out is not None and {tuple(train["id"]), tuple(held_out["id"])} == {("a", "b", "c"), ("d",)}


def test_combine_shards_writes_row_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches one row group of 2.15 GiB, which no reader takes, and memory that grows with the file."""
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 4000)
    paths = []
    for shard in range(3):
        paths.append(tmp_path / f"{shard}.parquet")
        some = [{**row, "id": f"{shard}-{n}"} for n, row in enumerate(rows(8))] if shard != 1 else []
        write_rows(some, paths[-1], make=make_image_rows, features=image_preference())
    target = combine_shards(paths, tmp_path / "pairs.parquet", empty_message="none")
    metadata = pq.ParquetFile(target).metadata
    assert metadata.num_rows == 16 and metadata.num_row_groups >= 4
    assert max(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)) <= 4
    assert load_pairs(str(target))["id"] == [f"{shard}-{n}" for shard in (0, 2) for n in range(8)]
    assert isinstance(load_pairs(str(target))[0]["image_a"], Image.Image)
    assert pa.types.is_struct(pq.read_schema(target).field("image_a").type)


@pytest.mark.parametrize(
    ("column", "error"),
    [
        ({"img": {"bytes": b"x", "path": None}}, "'img' has images and is not read. Rename it to images"),
        ({"scan": [{"bytes": b"x", "path": None}]}, "'scan' has images"),
        ({"image_path": "1.png"}, "'image_path' has images"),
        ({"videos": ["1.mp4"]}, "'videos' has video or audio"),
        ({"system": "Be kind."}, "'system' is not read.*dpo-mm import trl"),
    ],
)
def test_part_of_a_conversation_in_another_column_is_refused(
    tmp_path: Path, column: dict[str, object], error: str
) -> None:
    """Otherwise the rows train without it. Columns without content are allowed."""
    from datasets import Dataset

    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    Dataset.from_list([{**row, **column}]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=f"p.parquet: the column {error}"):
        load_responses(str(tmp_path / "p.parquet"))
    Dataset.from_list([{**row, "system": "", "videos": [], "score": 1.0}]).to_parquet(tmp_path / "q.parquet")
    assert len(load_responses(str(tmp_path / "q.parquet"))) == 1
