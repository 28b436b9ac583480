"""Training on pairs in another format is training on their import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.sources.importing import import_set
from dpo_mm.training.run import TrainResult, dry_run, train
from tests.conftest import rows

pytestmark = pytest.mark.slow


def test_two_folders_train_as_their_import(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same dataset digest and the same losses. The plan says what the folders were taken for. A run of another kind is refused."""
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    for row in rows(4):
        better, worse = ("a", "b") if row["preference"] == "a" else ("b", "a")
        for name, side in (("better", better), ("worse", worse)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{row['id']}.png").write_bytes(row[f"image_{side}"]["bytes"])  # type: ignore[index]
        (folder / "better" / f"{row['id']}.txt").write_text(str(row["prompt"]))
    import_set("two-folders", str(folder), str(tmp_path / "set"))

    def run(pairs: Path, name: str, **more: Any) -> tuple[TrainResult, str]:
        given = {"steps": 2, "batch_size": 2, "log_every": 1, "eval_fraction": 0.0, **more}
        result = train(TrainConfig(model=tiny_model, pairs=str(pairs), output_dir=str(tmp_path / name), **given))
        return result, json.loads((result.folder / "dpo_mm.json").read_text())["content"]["pairs"]

    (direct, digest), (imported, same) = run(folder, "direct"), run(tmp_path / "set", "imported")
    assert digest == same and [e.get("loss") for e in direct.history] == [e.get("loss") for e in imported.history]
    assert direct.settings["pairs"] == f"{folder} (better/worse folders, 4 pairs), 4 to train on"
    (tmp_path / "talk.csv").write_text("prompt,chosen,rejected\nWhat?,A dot.,Two.\n")
    with pytest.raises(
        ValueError, match=r"talk.csv: has responses \(table of responses, CSV, 1 pair\), and the model needs images"
    ):
        dry_run(TrainConfig(model=tiny_model, pairs=str(tmp_path / "talk.csv"), output_dir=str(tmp_path / "none")))
