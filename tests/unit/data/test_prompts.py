"""Published prompt files are read unchanged, with their own categories. Errors name the file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dpo_mm.data.prompts import PromptSpec, read_prompt_set, read_prompts

TAGS = {"single_object": 3, "two_object": 2, "counting": 2, "colors": 2, "position": 2, "color_attr": 2}


def geneval(path: Path) -> Path:
    """Rows of evaluation_metadata.jsonl, with one prompt twice."""
    rows = [
        {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {tag} {number % 2}"}
        for tag, count in TAGS.items()
        for number in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_read_prompt_set_geneval_has_six_categories_and_a_balanced_score(tmp_path: Path) -> None:
    prompt_set = read_prompt_set(str(geneval(tmp_path / "evaluation_metadata.jsonl")))
    assert (prompt_set.format, prompt_set.balanced, len(prompt_set.prompts)) == ("GenEval", True, 12)
    assert Counter(prompt.category for prompt in prompt_set.prompts) == {tag.replace("_", " "): 2 for tag in TAGS}
    few = read_prompt_set(str(tmp_path / "evaluation_metadata.jsonl"), limit=6)
    assert len({prompt.category for prompt in few.prompts}) == 6


def test_read_prompt_set_partiprompts_quotes_and_commas_are_unchanged(tmp_path: Path) -> None:
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
    assert read_prompt_set(str(path)).format == "PartiPrompts" and not read_prompt_set(str(path)).balanced


def test_read_prompt_set_compbench_file_and_folder(tmp_path: Path) -> None:
    for kind in ("color", "3d_spatial", "color_train"):
        (tmp_path / f"{kind}_val.txt").write_text(f"a green bench of {kind}\n\nanother of {kind}\n")
    single = read_prompt_set(str(tmp_path / "3d_spatial_val.txt"))
    assert single.format == "T2I-CompBench" and {p.category for p in single.prompts} == {"3d_spatial"}
    folder = read_prompt_set(str(tmp_path))
    assert Counter(prompt.category for prompt in folder.prompts) == {"3d_spatial": 2, "color": 2}


def test_read_prompt_set_dpg_bench_folder_has_one_prompt_per_file(tmp_path: Path) -> None:
    for name in ("256", "COCOval2014000000000042", "diffusiondb3", "posescript12"):
        (tmp_path / f"{name}.txt").write_text(f"A long prompt\nof {name}.\n")
    prompt_set = read_prompt_set(str(tmp_path))
    assert prompt_set.format == "DPG-Bench" and PromptSpec("A long prompt of 256.", "all") in prompt_set.prompts
    assert {prompt.category for prompt in prompt_set.prompts} == {"all", "COCOval", "diffusiondb", "posescript"}
    (tmp_path / "drawtext1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"drawtext1\.txt is empty"):
        read_prompt_set(str(tmp_path))


def test_read_prompts_plain_text_is_distinct_lines_in_order(tmp_path: Path) -> None:
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
        ("a.tsv", b"text\tkind\nx\ty\n", r"columns text, kind\. Expected Prompt and Category"),
        ("a.tsv", b"Prompt\tCategory\nx\t\n", "line 2: no Category"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("folder", None, r"no \*\.txt in this folder"),
        ("missing", None, "no such file"),
    ],
)
def test_read_prompt_set_bad_file_is_named_in_the_error(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompt_set(str(tmp_path / name))
