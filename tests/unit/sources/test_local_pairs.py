"""Datasets as people have them: each layout is detected, gives the rows that its import gives, and bad ones are refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from dpo_mm.config import RelabelConfig, TrainConfig
from dpo_mm.config.config_parsing import config_from_mapping
from dpo_mm.data.row_digest import digest
from dpo_mm.data.schema import load_pairs, load_responses, make_image_rows
from dpo_mm.doctor import examine
from dpo_mm.doctor.doctor_report import load_examples
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.sources import SOURCES
from dpo_mm.sources.importing import import_set
from dpo_mm.sources.local_pairs import LocalPairs, local_pairs
from tests.conftest import rows as image_rows
from tests.unit.sources.test_one_sided_sources import json_lines
from tests.unit.sources.test_sources import file_of, grey, parquet, write_images

USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in (("user", "<image>What?"), ("assistant", "A dot."), ("assistant", "Two.")))  # fmt: skip
TURNS = [{"from": "human", "value": "<image>What?"}]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))


def texts_next_to(folder: Path, *names: str, suffix: str = ".txt") -> None:
    for name in names:
        (folder / name).with_suffix(suffix).write_text(f"dot {Path(name).stem}\n")


def two_folders(root: Path) -> None:
    write_images(root / "better", "10.jpg", "deep/20.jpg")
    write_images(root / "worse", "10.jpg", "deep/20.jpg")
    (root / "worse" / "10.jpg").write_bytes(file_of(110))
    texts_next_to(root / "better", "10.jpg")
    json_lines(root / "metadata.jsonl", {"file_name": "deep/20.jpg", "text": "dot 20"})


def kohya_folders(root: Path) -> None:
    for side in "wl":
        write_images(root / "5_dots" / side, "10.jpg")
        texts_next_to(root / "5_dots" / side, "10.jpg", suffix=".caption")


def captioned_images(root: Path) -> None:
    write_images(root, "10.jpg", "20.jpg")
    texts_next_to(root, "10.jpg", "20.jpg")


def csv_of_images(root: Path) -> None:
    write_images(root, "a/10.jpg", "b/10.jpg")
    (root / "pairs.csv").write_text('prompt,image_a,image_b,preference\n"a dot, grey",a/10.jpg,b/10.jpg,b\n')


def csv_of_responses(root: Path) -> None:
    write_images(root, "10.jpg")
    (root / "pairs.csv").write_text("prompt,chosen,rejected,image\nWhat?,A dot.,Two.,10.jpg\n")


def of_rows(*rows: dict[str, Any], name: str = "pairs.jsonl") -> Any:
    def write(root: Path) -> None:
        write_images(root, "10.jpg")
        json_lines(root / name, *rows)

    return write


CHOSEN_REJECTED = {"chosen": ANSWER, "rejected": OTHER, "images": ["10.jpg"]}
LAYOUTS: dict[str, tuple[Any, str, str]] = {
    "two folders": (two_folders, "two-folders", "better/worse folders, 2 pairs"),
    "kohya": (kohya_folders, "kohya-folders", "kohya's w/l folders, 1 pair"),
    "captions": (captioned_images, "captioned-images", "captioned images, 2 rows"),
    "CSV of images": (csv_of_images, "custom-images", "table of images, CSV, 1 pair"),
    "CSV of responses": (csv_of_responses, "custom-responses", "table of responses, CSV, 1 pair"),
    "TRL": (
        of_rows({"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "images": ["10.jpg"]}),
        "trl",
        "rows as TRL's, JSON lines, 1 pair",
    ),
    "TRL, texts": (
        of_rows({"prompt": "What?", "chosen": "A dot.", "rejected": "Two.", "images": ["10.jpg"], "system": "Be brief."}),
        "trl",
        "rows as TRL's, JSON lines, 1 pair",
    ),
    "ShareGPT": (
        of_rows({"conversations": TURNS, **CHOSEN_REJECTED}),
        "llama-factory",
        "rows as LLaMA-Factory's, JSON lines, 1 pair",
    ),
    "OpenAI": (
        of_rows({"messages": [USER], **CHOSEN_REJECTED}),
        "llama-factory",
        "rows as LLaMA-Factory's, JSON lines, 1 pair",
    ),
    "Alpaca": (
        of_rows({"instruction": "<image>What?", "input": "", "chosen": "A dot.", "rejected": "Two.", "images": ["10.jpg"]}),
        "llama-factory",
        "rows as LLaMA-Factory's, JSON lines, 1 pair",
    ),
    "ms-swift": (
        of_rows({"messages": [USER, ANSWER], "rejected_response": "Two.", "images": ["10.jpg"]}),
        "ms-swift",
        "rows as ms-swift's, JSON lines, 1 pair",
    ),
    "ms-swift, messages": (
        of_rows({"messages": [USER, ANSWER], "rejected_messages": [USER, OTHER], "images": ["10.jpg"]}),
        "ms-swift",
        "rows as ms-swift's, JSON lines, 1 pair",
    ),
    "chats": (of_rows({"messages": [USER, ANSWER], "images": ["10.jpg"]}), "chat", "chats, JSON lines, 1 row"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_rows_of_its_import(layout: str, tmp_path: Path) -> None:
    """It is taken for its source, and the digest of its rows is that of `dpo-mm import`."""
    write, source, about = LAYOUTS[layout]
    write(tmp_path / "set")
    local = local_pairs(str(tmp_path / "set"))
    assert (local.kind, local.about) == (SOURCES[source].kind, about)
    import_set(source, str(tmp_path / "set"), str(tmp_path / "out"))
    load = load_pairs if local.kind == "images" else load_responses
    assert digest(load(local.path)) == digest(load(str(tmp_path / "out")))
    row = load(local.path).with_format("arrow")[:].to_pylist()[0]
    if local.kind == "responses":
        parts = [part["text"] for message in row["prompt"] for part in message["content"] if part["type"] == "text"]
        assert parts[-1] == "What?" and row["chosen"][0]["content"][0]["text"] == "A dot." and len(row["images"]) == 1
        assert layout == "chats" or row["rejected"][0]["content"][0]["text"] == "Two."
    elif layout == "two folders":
        assert (row["prompt"], row["preference"], grey(row["image_a"]), grey(row["image_b"])) == (
            "dot 10",
            "a",
            10,
            110,
        )


def test_own_rows_are_opened_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row schema and bundled datasets are not imported, and renaming their columns is refused."""
    pq.write_table(make_image_rows(image_rows(2)).data.table, tmp_path / "p.parquet")
    for path in (str(tmp_path / "p.parquet"), str(tmp_path), "no/such/file.parquet"):
        assert local_pairs(path) == LocalPairs(path)
    bundled = local_pairs("shapes-faithfulness")
    assert bundled.path.endswith("faithfulness.parquet") and not bundled.kind
    with pytest.raises(ValueError, match=r"has the columns of preference pairs already, so media_dir has no effect"):
        local_pairs(str(tmp_path / "p.parquet"), media_dir=str(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_columns_are_renamed_and_images_are_in_another_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "media", "10.jpg", "20.jpg")
    (tmp_path / "set").mkdir()
    table = tmp_path / "set" / "pairs.csv"
    table.write_text("caption,good,bad,preference\na dot,10.jpg,20.jpg,a\na dot,20.jpg,../set/pairs.csv,a\n")
    columns = {"caption": "prompt", "good": "image_a", "bad": "image_b"}
    local = local_pairs(str(table), columns=columns, media_dir=str(tmp_path / "media"))
    assert (
        local.about == "table of images, CSV, 1 pair, 1 left out because the path of an image leads out of its folder"
    )
    (row,) = load_pairs(local.path).with_format("arrow")[:].to_pylist()
    assert (row["prompt"], grey(row["image_a"]), grey(row["image_b"])) == ("a dot", 10, 20)
    with pytest.raises(ValueError, match=r"columns names 'captoin', which it does not have; did you mean 'caption'\?"):
        local_pairs(str(table), columns={"captoin": "prompt"})
    with pytest.raises(ValueError, match=r"media_dir .*nowhere: no such folder. Give the folder of the images"):
        local_pairs(str(table), columns=columns, media_dir=str(tmp_path / "nowhere"))
    values = {"pairs": "p", "model": "m", "output_dir": "o", "columns": "caption=prompt,good=image_a", "media_dir": "x"}
    config = config_from_mapping(TrainConfig, values, source="flags")
    assert config.columns == {"caption": "prompt", "good": "image_a"} and config.media_dir == "x"
    with pytest.raises(ValueError, match=r"flags: columns: expected names with their new names"):
        config_from_mapping(RelabelConfig, {"pairs": "p", "judges": "j", "output": "o", "columns": "x"}, source="flags")


def test_import_in_the_cache_is_made_once_and_follows_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder of the caller does not matter. A changed caption, a new image or a damaged copy is imported again."""
    csv_of_images(tmp_path / "set")
    (tmp_path / "set" / "pairs.csv").open("a").write("more,a/10.jpg,c/30.jpg,a\n")
    first = local_pairs(str(tmp_path / "set" / "pairs.csv"))
    assert first.about.endswith("1 pair, 1 left out because an image is missing")
    written = os.stat(f"{first.path}/part-00000.parquet").st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert local_pairs("set/pairs.csv") == first
    assert os.stat(f"{first.path}/part-00000.parquet").st_mtime_ns == written
    write_images(tmp_path / "set", "c/30.jpg")
    second = local_pairs("set/pairs.csv")
    assert second.about.endswith("2 pairs") and second.path != first.path
    (tmp_path / "set" / "c" / "30.jpg").write_bytes(file_of(31, "PNG"))
    third = local_pairs("set/pairs.csv")
    assert third.path != second.path
    Path(third.path, "part-00000.parquet").write_bytes(b"damaged")
    assert [
        grey(row["image_b"])
        for row in load_pairs(local_pairs("set/pairs.csv").path).with_format("arrow")[:].to_pylist()
    ] == [10, 31]


def test_dataset_of_the_hub_is_taken_for_its_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sets of the table of sources go by their name, others by their columns, and the row schema is left to `datasets`."""
    sets = {
        "me/swift": [{"messages": [USER | {"content": "Hi?"}, ANSWER], "rejected_response": "Two."}],
        "me/own": [{"prompt": "p", "chosen": "c", "rejected": "r"}],
    }

    def hub(name: str, streaming: bool = False) -> Any:
        return datasets.IterableDatasetDict({"train": datasets.Dataset.from_list(sets[name]).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr("dpo_mm.sources.local_pairs._revision", lambda path: "commit")
    assert local_pairs("me/swift").about == "rows as ms-swift's, of the hub, 1 pair"
    assert local_pairs("me/own") == LocalPairs("me/own")
    assert local_pairs("me/none") == LocalPairs("me/none")


def refused(write: Any, tmp_path: Path, path: str = "set") -> str:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set")
    with pytest.raises(ValueError, match=r".") as error:
        local_pairs(str(tmp_path / path))
    assert "\n" not in str(error.value)
    return str(error.value)


def without(name: str) -> Any:
    def write(root: Path) -> None:
        two_folders(root)
        (root / name).unlink()

    return write


def with_empty_prompt(root: Path) -> None:
    two_folders(root)
    (root / "better" / "10.txt").write_text(" \n")


def both(*writers: Any) -> Any:
    return lambda root: [write(root) for write in writers]


def text(content: str) -> Any:
    return lambda root: (root / "pairs.csv").write_text(content)


BAD: dict[str, tuple[Any, str]] = {
    "a missing file": (without("worse/10.jpg"), "worse/ has no image '10', which better/ has. Expected the same names in both"),
    "no prompt": (without("better/10.txt"), "better/10.jpg: no prompt. Expected a text file 10.txt next to it, or metadata.jsonl"),
    "an empty prompt": (with_empty_prompt, "better/10.txt: no prompt. Write it into the file, or remove the pair"),
    "one folder": (lambda root: write_images(root / "better", "1.jpg"), "has better/ and no worse/. Expected both"),
    "two layouts": (both(two_folders, csv_of_images), "mixed layouts (better/ and worse/, and pairs.csv). Give one of them"),
    "captions and a table": (both(captioned_images, csv_of_images), "mixed layouts (10.jpg with its text file, and pairs.csv)"),
    "no header": (text("a dot,a/10.jpg,b/10.jpg\na dot,a/20.jpg,b/20.jpg\n"), "its first line is 'a dot, a/10.jpg, b/10.jpg'"),
    "semicolons": (text("prompt;image_a;image_b;preference\na, b;1.jpg;2.jpg;a\n"), "pairs.csv: its separator is probably ';'. Save it with commas"),
    "a header only": (text("prompt,image_a,image_b,preference\n"), "Expected at least one row below a line with the names"),
    "unknown columns": (of_rows({"question": "q", "good": "g"}), "has columns question, good. Expected prompt, image_a, image_b"),
    "two formats": (
        of_rows({"messages": [USER, ANSWER], "rejected_response": "r", "prompt": "p", "image": "10.jpg", **CHOSEN_REJECTED}),
        "fit ms-swift and trl. Import it with one of them: dpo-mm import ms-swift",
    ),
    "nothing": (lambda root: write_images(root, "10.jpg"), "no preference data in this folder (it contains 10.jpg)"),
    "no prompt in a row": (
        of_rows({"prompt": None, "image_a": "10.jpg", "image_b": "10.jpg", "preference": "a"}),
        "pairs.jsonl, row 0: prompt is None. Expected text",
    ),
    "outside": (
        of_rows({"prompt": "p", "image_a": "10.jpg", "image_b": "../../etc/x.jpg", "preference": "a"}),
        "no row was imported (1 x the path of an image leads out of its folder)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    write, message = BAD[case]
    assert message in refused(write, tmp_path)


def test_dataset_that_contains_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "set" / "cache"))
    assert "lies in an input of the command" in (line := refused(two_folders, tmp_path))
    assert line.endswith("Set DPO_MM_CACHE to a folder outside of it") and not (tmp_path / "set" / "cache").exists()


def test_image_of_a_folder_that_is_not_decoded_is_counted(tmp_path: Path) -> None:
    two_folders(tmp_path / "set")
    for side in ("better", "worse"):
        (tmp_path / "set" / side / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        texts_next_to(tmp_path / "set" / side, "IMG_1.HEIC")
    about = local_pairs(str(tmp_path / "set")).about
    assert about.endswith("2 pairs, 1 left out because an image is a file of another kind")


def test_two_different_captions_of_a_pair_are_refused(tmp_path: Path) -> None:
    two_folders(tmp_path)
    (tmp_path / "worse" / "10.txt").write_text("another dot")
    with pytest.raises(
        ValueError, match=r"better/10.jpg: two prompts, 'another dot' and 'dot 10'. A pair has one prompt"
    ):
        import_set("two-folders", str(tmp_path), str(tmp_path.parent / "out"))


def test_parquet_of_another_format_is_imported(tmp_path: Path) -> None:
    """Columns of images inside Parquet count by the file. Unknown columns are left to the loader's error."""
    cells = [{"bytes": file_of(10), "path": None}]
    conversation = [{"from": "human", "value": "<image>What?"}]
    row = {
        "conversations": conversation,
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    }
    parquet(tmp_path / "set" / "train.parquet", [{**row, "images": cells}])
    local = local_pairs(str(tmp_path / "set"))
    assert local.about == "rows as LLaMA-Factory's, Parquet, 1 pair"
    assert (
        json.dumps(load_responses(local.path)[0]["chosen"])
        == '[{"role": "assistant", "content": [{"type": "text", "text": "c"}]}]'
    )
    parquet(tmp_path / "x.parquet", [{"prompt": "p", "image_a": "a", "prefrence": "a"}])
    assert local_pairs(str(tmp_path / "x.parquet")) == LocalPairs(str(tmp_path / "x.parquet"))


def test_doctor_and_label_page_take_a_table(tmp_path: Path) -> None:
    csv_of_images(tmp_path / "set")
    diagnosis = examine(str(tmp_path / "set"), held_out=str(tmp_path / "set"))
    assert diagnosis.facts["taken for"] == "table of images, CSV, 1 pair" and diagnosis.name == str(tmp_path / "set")
    assert "held-out-prompts" in {finding.check for finding in diagnosis.findings} and load_examples(diagnosis)
    assert open_pairs(str(tmp_path / "set" / "pairs.csv"))["prompt"] == ["a dot, grey"]
    csv_of_responses(tmp_path / "other")
    responses = open_pairs(str(tmp_path / "other"))
    assert len(responses) == 1 and {"chosen", "rejected"} <= set(responses.column_names)
