"""Pairs to label: whole columns are read at once, and prompts of a folder stay inside it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from datasets import Dataset
from datasets.arrow_dataset import Column

from dpo_mm.data.image_files import encode_png
from dpo_mm.labels import model_folders
from dpo_mm.labels.export import _labelled
from dpo_mm.labels.pairs import file_bytes, open_pairs, pair_digest
from dpo_mm.pages.label_page import pair_html
from tests.conftest import noise_image, rows


def model_images(folder: Path, names: list[str], models: tuple[str, ...] = ("base", "tuned")) -> Path:
    for model in models:
        (folder / model).mkdir(parents=True)
        for number, name in enumerate(names):
            noise_image(number).save(folder / model / f"{name}.png")
    return folder


def test_pairs_open_without_a_look_at_each_row(
    write_pairs: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It catches a loop over rows or over a column, which took 30 microseconds per row and column."""

    def refuse(*arguments: Any) -> NoReturn:
        raise AssertionError("rows were read one by one")

    path, folder = write_pairs(rows(4)), str(model_images(tmp_path / "folder", ["one", "two"]))
    monkeypatch.setattr(Dataset, "__iter__", refuse)
    monkeypatch.setattr(Column, "__iter__", refuse)
    schemas: list[None] = []
    schema_of = model_folders.image_preference
    monkeypatch.setattr(model_folders, "image_preference", lambda **_: (schemas.append(None), schema_of())[1])
    assert open_pairs(path)["id"][:] == [f"row-{n}" for n in range(4)]
    assert open_pairs(folder)["id"][:] == ["one", "two"] and len(schemas) == 1, "the schema is built once"


def test_image_to_edit_of_a_folder_is_shown_exported_and_part_of_the_digest(tmp_path: Path) -> None:
    """It catches a source that the page, the export or the check for changed pairs leaves out."""
    folder = model_images(tmp_path / "folder", ["one", "two"])
    noise_image(7).save(folder / "one.png")
    (tmp_path / "secret.png").write_bytes(encode_png(noise_image(8)))
    (folder / "two.png").symlink_to(tmp_path / "secret.png")
    edit, plain = open_pairs(str(folder))
    assert plain["image_source"] is None and file_bytes(edit["image_source"]) == (folder / "one.png").read_bytes()
    assert pair_html(edit, 1, "me", swapped=False).count("<img") == 3 and "image to edit" in pair_html(
        edit, 1, "me", swapped=True
    )
    assert pair_html(plain, 1, "me", swapped=False).count("<img") == 2
    exported = _labelled(edit, {"preference": "a"})
    assert exported and exported["image_source"] == {"bytes": (folder / "one.png").read_bytes(), "path": None}
    before = pair_digest(edit)
    noise_image(9).save(folder / "one.png")
    assert pair_digest(edit) != before and pair_digest(plain) == pair_digest({**plain, "image_source": None})


def test_prompts_of_a_folder_are_its_own_files(tmp_path: Path) -> None:
    """It catches a link that leads out of the folder, and an order of the folders that changes."""
    folder = model_images(tmp_path / "folder", ["one-a", "two", "three", "four"])
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "one-a.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "two.txt").write_bytes(gzip.compress("zwei große Kreise\n".encode()))
    (folder / "base" / "two.txt").write_text("of a subfolder")
    (folder / "tuned" / "three.txt").write_bytes(b"\xef\xbb\xbfthree\r\nlines\r\n")
    (folder / "here.txt").write_text(" a link inside ")
    (folder / "four.txt").symlink_to("here.txt")
    prompts = dict(zip(*(open_pairs(str(folder))[column][:] for column in ("id", "prompt")), strict=True))
    assert prompts == {
        "one-a": "one a",
        "two": "zwei große Kreise",
        "three": "three\nlines",
        "four": "a link inside",
    }
    (folder / "two.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"two\.txt: not UTF-8 text"):
        open_pairs(str(folder))
