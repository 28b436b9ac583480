"""A run killed at any moment resumes to the same bits, in real processes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy
from tests import forked
from tests.bench import kills as bench

RUN = ["--steps", "40", "--batch-size", "2", "--save-every", "4", "--log-every", "1", "--eval-fraction", "0"]


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(recipe), "--output-dir", str(out), *RUN, *more]


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Three kills, two of them in a save; `python -m tests.bench.kills` makes 30, docs/benchmarks/kills.json is its log."""
    forked.run(str(tmp_path / "log.json"), "--kills", "3", call=bench.main, check=True)
    kills = json.loads((tmp_path / "log.json").read_text())["kills"]
    assert len(kills) == 3 and all(kill["same bits"] for kill in kills), kills
    assert all(kills[n]["newest"] for n in (0, 2)) or any(kill["in a save"] for kill in kills)


def test_the_log_of_25_kills() -> None:
    log = json.loads((Path(__file__).parents[2] / "docs" / "benchmarks" / "kills.json").read_text())
    assert len(log["kills"]) >= 25 and all(kill["same bits"] for kill in log["kills"])
    assert sum(kill["in a save"] for kill in log["kills"]) >= 5


def with_a_full_disk() -> None:
    """The command, on a disk that is full at the second save."""
    real, calls = DiffusionPolicy.save, []

    def save(self: DiffusionPolicy, folder: Path, weights: Any = None) -> None:
        calls.append(folder)
        real(self, folder, weights)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    DiffusionPolicy.save = save  # type: ignore[method-assign]
    forked.command()


@pytest.mark.slow
def test_a_save_that_fails_keeps_the_one_before(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """The second checkpoint meets a full disk: the first stays, nothing half-written does, the message is one line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\n")
    done = forked.run(*command(recipe, tmp_path / "out"), call=with_a_full_disk)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "checkpoint-8" in errors[0] and "No space left on device" in errors[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-4"]
