"""Image store: saved images are looked up by how they were generated, and only if they are intact."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpo_mm.evaluation import image_store as module
from dpo_mm.evaluation.image_store import ImageFiles, ImageStore

SETTINGS: dict[str, Any] = {"model": "m", "revision": None, "adapter": None, "weights": "w", "scale": 1.0, "steps": 4}
RED, BLUE = Image.new("RGB", (8, 8), "#ff0000"), Image.new("RGB", (8, 8), "#0000ff")


def filled(folder: Path) -> ImageStore:
    store = ImageStore(folder)
    store.add(SETTINGS, [("a red circle", 1, RED), ("a blue circle", 2, BLUE)], label="tuned")
    return store


def test_image_is_looked_up_by_weights_and_settings_only(tmp_path: Path) -> None:
    filled(tmp_path)
    again = ImageStore(tmp_path)
    path = again.find({**SETTINGS, "model": "elsewhere/m", "adapter": "copy"}, "a red circle", 1)
    assert path is not None and Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    for change in ({"steps": 5}, {"weights": "v"}, {"scale": 0.5}):
        assert again.find({**SETTINGS, **change}, "a red circle", 1) is None
    assert again.find(SETTINGS, "a red circle", 2) is None and again.find(SETTINGS, "a blue circle", 1) is None


def test_manifest_records_the_settings_of_each_image(tmp_path: Path) -> None:
    filled(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red circle", "a blue circle"]
    assert all(SETTINGS.items() <= row.items() for row in rows)
    assert all(len(row["sha256"]) == 64 and (tmp_path / row["file"]).is_file() for row in rows)
    assert all(row["file"].startswith("tuned/") for row in rows)


@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_damaged_image_is_not_returned(harm: str, tmp_path: Path) -> None:
    path = filled(tmp_path).find(SETTINGS, "a red circle", 1)
    assert path is not None
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if harm == "cut" else b"another picture")
    again = ImageStore(tmp_path)
    assert again.find(SETTINGS, "a red circle", 1) is None and again.find(SETTINGS, "a blue circle", 2) is not None
    again.add(SETTINGS, [("a red circle", 1, RED)], label="tuned")
    assert ImageStore(tmp_path).find(SETTINGS, "a red circle", 1) is not None


def test_incomplete_files_and_rows_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-30])
    (tmp_path / "tuned" / ".half.png.7.part").write_bytes(b"half")
    again = ImageStore(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert again.find(SETTINGS, "a red circle", 1) is not None and again.find(SETTINGS, "a blue circle", 2) is None
    again.add(SETTINGS, [("a blue circle", 2, BLUE)], label="tuned")
    assert len(ImageStore(tmp_path).rows) == 2
    manifest.write_text("{broken\n" + manifest.read_text())
    with pytest.raises(ValueError, match=r"manifest\.jsonl is damaged"):
        ImageStore(tmp_path)


def test_score_is_looked_up_by_card_image_and_prompt(tmp_path: Path) -> None:
    filled(tmp_path).add_scores("judge", "card", [("hash", "a red circle", 0.25)])
    again = ImageStore(tmp_path)
    assert again.score("card", "hash", "a red circle") == 0.25
    for other in (("another card", "hash", "a red circle"), ("card", "other", "a red circle"), ("card", "hash", "x")):
        assert again.score(*other) is None


def test_image_files_are_decoded_on_access(tmp_path: Path) -> None:
    filled(tmp_path)
    files = sorted((tmp_path / "tuned").glob("*.png"))
    pictures = ImageFiles([*files, tmp_path / "missing.png"])
    assert len(pictures) == 3 and pictures[0].mode == "RGB" and len(pictures[1:]) == 2
    with pytest.raises(FileNotFoundError):
        pictures[2]


def test_full_disk_raises_and_leaves_no_incomplete_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.Path, "replace", full)
    with pytest.raises(
        OSError, match=r"could not write .*\.png: No space left on device\. Free space and run the same"
    ):
        filled(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.part"))
    assert ImageStore(tmp_path).rows == {}
