"""Tests of judges that lie in the folder in which a command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dpo_mm.config import CompareConfig, RelabelConfig, SidePrompts, TrainConfig
from dpo_mm.judges import load_judge
from dpo_mm.judges.working_folder import _judge_names, import_from_working_folder
from tests import forked
from tests.conftest import noise_image

JUDGE = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import my_helper

def score(images, prompts):
    return [my_helper.red(image) for image in images]

def score_in_processes(images, prompts):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return list(pool.map(my_helper.red, images))
"""
HELPER = "def red(image):\n    return float(image.size[0])\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_judge.py").write_text(JUDGE)
    (tmp_path / "my_helper.py").write_text(HELPER)
    (tmp_path / "images").mkdir()
    noise_image(0).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a photo")
    return tmp_path


@pytest.mark.slow
def test_command_scores_with_a_judge_in_its_folder(folder: Path) -> None:
    """`dpo-mm`, unlike `python -m`, does not search the working folder by itself."""
    forked.run("judge", "my_judge:score", "--images", "images", "--output", "scores.parquet", cwd=folder, check=True)
    assert pd.read_parquet(folder / "scores.parquet")["score"].tolist() == [32.0]


@pytest.mark.slow
def test_judge_may_use_processes(folder: Path) -> None:
    """Each process imports the main module of the command again, which must not run the command again."""
    command = [sys.executable, "-m", "dpo_mm", "judge", "my_judge:score_in_processes", "--images", "images"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pd.read_parquet(folder / "scores.parquet")["score"].tolist() == [32.0]


def test_folder_comes_last_and_only_for_modules_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (folder / "json.py").write_text("raise SystemExit('imported')")
    before = list(sys.path)
    import_from_working_folder(["json:score", "missing_judge:score", "faithfulness", "clip_score:ViT-B-32/openai"])
    assert sys.path == before
    with pytest.raises(ValueError, match="judge 'my_judge:score' cannot be imported"):
        load_judge("my_judge:score")  # a name that the user did not give, such as one of a result folder
    import_from_working_folder("faithfulness, my_judge:score")
    assert sys.path == [*before, str(folder)]
    assert load_judge("my_judge:score")([noise_image(0)], ["a"]) == [32.0]
    for name in ("my_judge", "my_helper"):
        del sys.modules[name]


def test_judges_of_all_parts_of_a_config() -> None:
    config = CompareConfig("m", "out", judges=("a:b", "c"), side_sets=(SidePrompts("p", judges=("d:e",)),))
    assert list(_judge_names(config)) == ["a:b", "c", "d:e"]
    assert list(_judge_names(TrainConfig("m", "p", "out", sample_judges=("i:j",)))) == ["i:j"]
    assert list(_judge_names(RelabelConfig("p", ("f:g", "h"), "out"))) == ["f:g", "h"]
