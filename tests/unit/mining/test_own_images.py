"""A captioned folder becomes pairs against the model's own samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import dpo_mm.mining.own_images as own_images
from dpo_mm import mine
from dpo_mm.config import MineConfig
from dpo_mm.data.schema import load_pairs
from tests.contracts.families import WORDS
from tests.unit.sources.test_sources import file_of

pytestmark = pytest.mark.slow


def test_captioned_folder_against_samples(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's image wins, whole and unchanged, at either position. An interrupted run resumes, and judges are refused."""
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(file_of(40 * number))
        (folder / f"{number}.txt").write_text(WORDS[0])  # one caption for all: their samples differ
    given = {"chosen": "own", "shard_size": 1, "pairs_per_prompt": 2, "num_inference_steps": 2, "batch_size": 2}
    config = MineConfig(tiny_model, str(folder), str(tmp_path / "mined"), **given)  # type: ignore[arg-type]
    sample, calls = own_images._pair_with_samples, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(own_images, "_pair_with_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(config)
    rows = load_pairs(str(mine(config).path)).with_format("arrow")[:].to_pylist()
    assert len(calls) == 1 + 1 + 2 and len(rows) == 6 and {row["preference"] for row in rows} == {"a", "b"}
    for row in rows:
        winner, loser = ("a", "b") if row["preference"] == "a" else ("b", "a")
        number = int(row["id"][0])
        assert row[f"image_{winner}"]["bytes"] == file_of(40 * number) and row[f"model_{winner}"] is None
        assert row[f"model_{loser}"] == tiny_model and row[f"seed_{loser}"] is not None
    samples = {row["image_b" if row["preference"] == "a" else "image_a"]["bytes"] for row in rows}
    assert len(samples) == 6
    for change, message in (
        ({"judges": ("faithfulness",)}, "judges has no effect with chosen own"),
        ({"chosen": None}, "judges missing. Give them in the file or as --judges, or set chosen to own"),
        ({"chosen": "judge"}, "chosen is 'judge'. Expected own"),
    ):
        with pytest.raises(ValueError, match=message):
            mine(dataclasses.replace(config, output_dir=str(tmp_path / "other"), **change))  # type: ignore[arg-type]
