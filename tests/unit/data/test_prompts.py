"""Published prompt files are read as they are, with their own categories; a file that isn't one says so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dpo_mm.data.prompts import PromptSpec, read_prompt_set, read_prompts

TAGS = {"single_object": 3, "two_object": 2, "counting": 2, "colors": 2, "position": 2, "color_attr": 2}


def geneval(path: Path) -> Path:
    """Rows as evaluation_metadata.jsonl has them, one prompt twice."""
    rows = [
        {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {tag} {number % 2}"}
        for tag, count in TAGS.items()
        for number in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_geneval_has_its_six_tasks_and_its_score(tmp_path: Path) -> None:
    found = read_prompt_set(str(geneval(tmp_path / "evaluation_metadata.jsonl")))
    assert (found.form, found.balanced, len(found.prompts)) == ("GenEval", True, 12)
    assert Counter(prompt.category for prompt in found.prompts) == {tag.replace("_", " "): 2 for tag in TAGS}
    few = read_prompt_set(str(tmp_path / "evaluation_metadata.jsonl"), limit=6)
    assert len({prompt.category for prompt in few.prompts}) == 6


def test_partiprompts_keeps_quotation_marks_and_commas(tmp_path: Path) -> None:
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        "Prompt\tCategory\tChallenge\tNote\n"
        'The words "Fly an airplane" on a wall, in grey \tOutdoor Scenes\tComplex\t\n'
        '"\tAbstract\tBasic\ta lone mark\n'
        "Salvador Dalí\tPeople\tBasic\t\n",
        encoding="utf-8",
    )
    assert read_prompt_set(str(path)).prompts == (
        PromptSpec('The words "Fly an airplane" on a wall, in grey', "Outdoor Scenes"),
        PromptSpec('"', "Abstract"),
        PromptSpec("Salvador Dalí", "People"),
    )
    assert read_prompt_set(str(path)).form == "PartiPrompts" and not read_prompt_set(str(path)).balanced


def test_compbench_is_a_file_or_a_folder_of_them(tmp_path: Path) -> None:
    for kind in ("color", "3d_spatial", "color_train"):
        (tmp_path / f"{kind}_val.txt").write_text(f"a green bench of {kind}\n\nanother of {kind}\n")
    alone = read_prompt_set(str(tmp_path / "3d_spatial_val.txt"))
    assert alone.form == "T2I-CompBench" and {p.category for p in alone.prompts} == {"3d_spatial"}
    whole = read_prompt_set(str(tmp_path))
    assert Counter(prompt.category for prompt in whole.prompts) == {"3d_spatial": 2, "color": 2}


def test_dpg_is_a_folder_of_a_file_a_prompt(tmp_path: Path) -> None:
    for name in ("256", "COCOval2014000000000042", "diffusiondb3", "posescript12"):
        (tmp_path / f"{name}.txt").write_text(f"A long prompt\nof {name}.\n")
    found = read_prompt_set(str(tmp_path))
    assert found.form == "DPG-Bench" and PromptSpec("A long prompt of 256.", "all") in found.prompts
    assert {prompt.category for prompt in found.prompts} == {"all", "COCOval", "diffusiondb", "posescript"}
    (tmp_path / "drawtext1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"drawtext1\.txt is empty"):
        read_prompt_set(str(tmp_path))


def test_plain_text_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\ufeffa red circle\n\nthree stars\na dog in a hat\n a red circle\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a red circle", "three stars", "a dog in a hat"]
    kinds = [prompt.category for prompt in read_prompt_set(str(path)).prompts]
    assert kinds == ["colours", "counting", "all"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"tag": "colors"}\n', r"a\.jsonl, line 2: no prompt"),
        ("a.jsonl", b"a red circle\n", "line 1: not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1: no prompt"),
        ("a.tsv", b"text\tkind\nx\ty\n", "columns text, kind; expected Prompt and Category"),
        ("a.tsv", b"Prompt\tCategory\nx\t\n", "line 2: no Category"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("folder", None, r"no \*\.txt in this folder"),
        ("missing", None, "no such file"),
    ],
)
def test_a_file_that_is_none_says_so(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompt_set(str(tmp_path / name))
