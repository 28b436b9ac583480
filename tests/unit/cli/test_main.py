from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_mm.cli.main import main, parse_overrides


def test_flags_are_read() -> None:
    assert parse_overrides(["--learning-rate", "1e-4", "--compare.seed=3"]) == {
        "learning_rate": "1e-4",
        "compare.seed": "3",
    }
    with pytest.raises(ValueError, match="'x' is not a flag"):
        parse_overrides(["x"])
    assert parse_overrides(["--resume", "--steps", "-1"]) == {"resume": "true", "steps": "-1"}


def test_a_mistake_is_one_line(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train:\n  model: {tiny_model}\n  pairs: {pairs}\n  output_dir: {tmp_path}/out\n")
    for arguments, message in (
        (["train", str(recipe), "--learning-rat", "1"], "did you mean 'learning_rate'"),
        (["train", str(recipe), "--beta", "0"], "beta must be above 0"),
        (["train", str(tmp_path / "none.yaml")], "no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["dpo-mm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (2, "")
        assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """One mistake through a real interpreter: its exit status and its one line are those of the function above."""
    command = [sys.executable, "-m", "dpo_mm", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "no such file" in done.stderr


@pytest.mark.slow
def test_a_dry_run_plans_and_stops(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\noutput_dir: {tmp_path}/out\n")
    command = [sys.executable, "-m", "dpo_mm", "train", str(recipe), "--steps", "7", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "effective beta" in done.stdout and "7 of 4 x 1 pairs" in done.stdout and "reduction" in done.stdout
    assert not (tmp_path / "out").exists()
