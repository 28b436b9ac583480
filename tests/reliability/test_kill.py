"""A run that is killed at any moment resumes to bit-identical weights, in real processes."""

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
def test_killed_runs_resume_to_bit_identical_weights(tmp_path: Path) -> None:
    """Kill three runs, two of them during a save.

    `python -m tests.bench.kills` kills 30 runs. Its log is docs/benchmarks/kills.json.
    """
    forked.run(str(tmp_path / "log.json"), "--kills", "3", call=bench.main, check=True)
    kills = json.loads((tmp_path / "log.json").read_text())["kills"]
    assert len(kills) == 3 and all(kill["same bits"] for kill in kills), kills
    assert all(kills[n]["newest"] for n in (0, 2)) or any(kill["in a save"] for kill in kills)


def test_kill_log_has_25_bit_identical_resumes() -> None:
    log = json.loads((Path(__file__).parents[2] / "docs" / "benchmarks" / "kills.json").read_text())
    assert len(log["kills"]) >= 25 and all(kill["same bits"] for kill in log["kills"])
    assert sum(kill["in a save"] for kill in log["kills"]) >= 5


def run_on_a_full_disk() -> None:
    """Run the command on a disk that is full at the second save."""
    save_adapter, calls = DiffusionPolicy.save, []

    def save(self: DiffusionPolicy, folder: Path, weights: Any = None) -> None:
        calls.append(folder)
        save_adapter(self, folder, weights)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    DiffusionPolicy.save = save  # type: ignore[method-assign]
    forked.command()


@pytest.mark.slow
def test_failed_save_leaves_the_previous_checkpoint_unchanged(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """The disk is full at the second checkpoint. The first one remains, no partial files do, and the error is one line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\n")
    done = forked.run(*command(recipe, tmp_path / "out"), call=run_on_a_full_disk)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "checkpoint-8" in errors[0] and "No space left on device" in errors[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-4", "dpo_mm.json"]
