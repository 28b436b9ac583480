from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_mm.cli.main import flags


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dpo_mm", *arguments], capture_output=True, text=True, check=False)


def test_flags_are_read() -> None:
    assert flags(["--learning-rate", "1e-4", "--compare.seed=3"]) == {"learning_rate": "1e-4", "compare.seed": "3"}
    with pytest.raises(ValueError, match="'x' is not a flag"):
        flags(["x"])
    assert flags(["--resume", "--steps", "-1"]) == {"resume": "true", "steps": "-1"}


def test_a_mistake_is_one_line(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train:\n  model: {tiny_model}\n  pairs: {pairs}\n  output_dir: {tmp_path}/out\n")
    for arguments, message in (
        (["train", str(recipe), "--learning-rat", "1"], "did you mean 'learning_rate'"),
        (["train", str(recipe), "--beta", "0"], "beta must be above 0"),
        (["train", str(tmp_path / "none.yaml")], "no such file"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_dry_run_plans_and_stops(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\noutput_dir: {tmp_path}/out\n")
    done = run("train", str(recipe), "--steps", "7", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "effective beta" in done.stdout and "7 of 4 x 1 pairs" in done.stdout and "reduction" in done.stdout
    assert not (tmp_path / "out").exists()
