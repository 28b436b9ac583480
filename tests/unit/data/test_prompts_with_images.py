"""Prompt lists with images to edit: every format gives the same prompts, and paths stay in the folder of the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_mm.data.image_files import encode_png
from dpo_mm.data.prompts import PromptSet, read_prompt_set, read_prompts, seeds_of
from tests.conftest import noise_image

TEXTS, FILES = ("make it red", "make it red", "remove it"), ("a.png", "b.png", "a.png")
ROWS: list[dict[str, Any]] = [{"prompt": text, "image": f"in/{name}"} for text, name in zip(TEXTS, FILES, strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images below `in`, and a third outside of it."""
    inside = tmp_path / "list"
    (inside / "in").mkdir(parents=True)
    for number, path in enumerate(("list/in/a.png", "list/in/b.png", "outside.png")):
        (tmp_path / path).write_bytes(encode_png(noise_image(number)))
    return inside


def json_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def written(folder: Path, form: str) -> str:
    """Write the list in one of the formats and return its name."""
    path = folder / form
    if form == "metadata.jsonl":
        json_lines(path, [{"file_name": row["image"], "prompt": row["prompt"]} for row in ROWS])
        return str(folder)
    if form == "lists.jsonl":
        return json_lines(path, [{"prompt": row["prompt"], "images": [row["image"]]} for row in ROWS])
    if form == "rows.csv":
        path.write_text("prompt,image\n" + "".join(f"{row['prompt']},{row['image']}\n" for row in ROWS))
    elif form == "rows.json":
        path.write_text(json.dumps(ROWS))
    elif form.endswith(".parquet"):
        column = "image_source" if form == "pairs.parquet" else "image"
        cells = [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in ROWS]
        if form == "paths.parquet":
            cells = [{"bytes": None, "path": row["image"]} for row in ROWS]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pq.write_table(pa.table({"prompt": list(TEXTS), column: pa.array(cells, kind)}), path)
    else:
        json_lines(path, ROWS)
    return str(path)


FORMS = ("rows.jsonl", "lists.jsonl", "rows.json", "rows.csv", "metadata.jsonl", "rows.parquet", "paths.parquet", "pairs.parquet")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_prompts_and_images(form: str, folder: Path) -> None:
    prompts = read_prompt_set(written(folder, form)).prompts
    assert tuple(prompt.text for prompt in prompts) == TEXTS  # two are the same text with another image
    for prompt, name in zip(prompts, FILES, strict=True):
        (source,) = prompt.sources
        assert np.array_equal(source, noise_image("ab".index(name[0])))
    same = read_prompt_set(written(folder, "rows.jsonl")).prompts
    assert [prompt.item for prompt in prompts] == [prompt.item for prompt in same]


def test_item_content_and_seeds_depend_on_the_image(folder: Path) -> None:
    name = written(folder, "rows.jsonl")
    red, other, _ = prompts = read_prompt_set(name).prompts
    assert red.item != other.item and red.content[:2] == other.content[:2] and red.content != other.content
    seeds = [seeds_of(prompt.text, 2, seed=0, sources=prompt.sources.file_hashes) for prompt in prompts]
    assert seeds[0] != seeds[1] and seeds_of("make it red", 2, seed=0) not in seeds
    assert seeds_of("a red circle", 2, seed=7) == [1332946712, 1332946713]  # as before there were images
    assert PromptSet(prompts, "JSON").content != PromptSet((red, red, prompts[2]), "JSON").content
    (folder / "in" / "a.png").write_bytes(encode_png(noise_image(9)))
    assert read_prompt_set(name).prompts[0].item != red.item  # by content, not by path


def test_twice_the_same_image_under_two_names_is_one_prompt(folder: Path) -> None:
    (folder / "in" / "copy.png").write_bytes((folder / "in" / "a.png").read_bytes())
    name = json_lines(folder / "p.jsonl", [ROWS[0], {**ROWS[0], "image": "in/copy.png"}])
    assert len(read_prompt_set(name).prompts) == 1


def test_read_prompts_refuses_images_that_its_callers_would_not_pass(folder: Path) -> None:
    with pytest.raises(ValueError, match="they have images to edit, which only compare and mine pass"):
        read_prompts(written(folder, "rows.jsonl"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("../outside.png", "line 2: image .*leads out of the folder"),
        ("/etc/hostname", "line 2: image .*leads out of the folder"),
        ("link.png", "line 2: image .*leads out of the folder"),
        ("https://example.org/a.png", "line 2: image .*is a URL"),
        ("none.png", "line 2: image .*none.png"),
        ("page.png", "line 2: image .*not an image"),
        (7, "line 2: image .*int"),
        ([None], "line 2: image .*it is missing"),
    ],
)
def test_bad_image_is_named_with_its_line(image: Any, message: str, folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "page.png").write_text("<html>")
    name = json_lines(folder / "p.jsonl", [ROWS[0], {"prompt": "x", "image": image}])
    with pytest.raises(ValueError, match=message) as raised:
        read_prompt_set(name)
    assert "\n" not in str(raised.value)


def test_folder_line_without_file_name_is_named(folder: Path) -> None:
    json_lines(folder / "metadata.jsonl", [{"file_name": "in/a.png", "text": "x"}, {"prompt": "y"}])
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: no file_name"):
        read_prompt_set(str(folder))


def test_metadata_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    json_lines(folder.parent / "other.jsonl", [{"file_name": "in/a.png", "prompt": "x"}])
    (folder / "metadata.jsonl").symlink_to(folder.parent / "other.jsonl")
    with pytest.raises(ValueError, match="not a regular file of this folder"):
        read_prompt_set(str(folder))
