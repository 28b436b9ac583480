"""The page of a run is written while it trains, and takes no time in a short run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dpo_mm.config import TrainConfig
from dpo_mm.files.checksums import remove_unchanged_files, write_complete
from dpo_mm.training import progress_page as module
from dpo_mm.training.progress_page import PAGE, ProgressPageCallback

HISTORY = [{"step": n, "loss": 0.69 - n / 100, "rewards/accuracies": 0.5 + n / 100} for n in range(1, 5)]
STATE = SimpleNamespace(log_history=HISTORY, global_step=4, max_steps=9)
PLAN = {"pairs": "<script>alert(1)</script>"}


def callback(folder: Path, monkeypatch: Any, now: list[float]) -> ProgressPageCallback:
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return ProgressPageCallback(TrainConfig("m", "p", str(folder)), PLAN)


def test_page_is_written_once_per_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page in a short run, one per log, text that is not escaped, and a last page that reloads itself."""
    now = [0.0]
    page = callback(tmp_path, monkeypatch, now)
    now[0] = 59.0
    page.on_log(None, STATE, None)
    page.on_train_end(None, STATE, None)
    assert not (tmp_path / PAGE).exists()
    now[0] = 61.0
    page.on_log(None, STATE, None)
    text = (tmp_path / PAGE).read_text()
    assert "Step 4 of 9" in text and text.count("<svg") == 2 and 'http-equiv="refresh"' in text
    assert "<script" not in text and "&lt;script&gt;" in text and "samples/strip.png" not in text
    (tmp_path / PAGE).unlink()
    now[0] = 62.0
    page.on_log(None, STATE, None)
    assert not (tmp_path / PAGE).exists()
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "samples" / "strip.png")
    page.on_train_end(None, STATE, None)
    text = (tmp_path / PAGE).read_text()
    assert 'http-equiv="refresh"' not in text and 'src="samples/strip.png"' in text
    write_complete(tmp_path, {})
    remove_unchanged_files(tmp_path)  # as --overwrite does
    assert not (tmp_path / PAGE).exists()


def test_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    page = callback(tmp_path / "missing", monkeypatch, now)
    now[0] = 61.0
    page.on_log(None, STATE, None)
    assert PAGE in caplog.text and not page.is_written
