"""Two processes see the single process's pairs and draws, and give its losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.pictures import encode_png
from tests.conftest import picture, rows

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
"""What `accelerate launch` runs for several processes."""
COMMON = ["--steps", "4", "--save-every", "4", "--log-every", "1", "--learning-rate", "1e-3", "--eval-fraction", "0.34"]


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("objective", ["sigmoid", "kto"])
def test_two_processes_give_the_losses_of_one(objective: str, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\nobjective: {objective}\nbeta: 500\n")
    one = [sys.executable, "-m", "dpo_mm", "train", str(recipe), *COMMON]
    subprocess.run([*one, "--batch-size", "4", "--output-dir", str(tmp_path / "one")], check=True, capture_output=True)
    two = [
        *TWO,
        "-m",
        "dpo_mm",
        "train",
        str(recipe),
        *COMMON,
        "--batch-size",
        "2",
        "--output-dir",
        str(tmp_path / "two"),
    ]
    done = subprocess.run(two, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    single, double = history(tmp_path / "one"), history(tmp_path / "two")
    for name in ("loss", "accuracy", "margin", "error_chosen"):
        values = [[entry[name] for entry in log if name in entry] for log in (single, double)]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], abs=1e-3 if name == "margin" else 1e-4)
    assert (tmp_path / "two" / "pytorch_lora_weights.safetensors").exists()


def test_frames_come_in_the_same_order_on_two_processes(
    tiny_model: str, write_pairs: Callable[..., str], tmp_path: Path
) -> None:
    """Two processes make the steps of one that accumulates twice, and each encodes its own shards."""
    some = rows(10)
    for number, row in enumerate(some):
        size = [(32, 32), (80, 48), (48, 80)][number % 3]
        for place, side in enumerate(("image_a", "image_b")):
            row[side] = {"bytes": encode_png(picture(2 * number + place, 64).resize(size)), "path": None}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {write_pairs(some)}\nbeta: 500\nbuckets: true\nbatch_size: 2\n")
    logs = {}
    for name, launch, accumulate in (("one", [sys.executable], "2"), ("two", TWO, "1")):
        command = [*launch, "-m", "dpo_mm", "train", str(recipe), *COMMON, "--accumulate", accumulate]
        environment = {**os.environ, "DPO_MM_CACHE": str(tmp_path / name)}
        done = subprocess.run(
            [*command, "--output-dir", str(tmp_path / name)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        logs[name] = history(tmp_path / name)
    for measure in ("loss", "margin"):
        values = [[entry[measure] for entry in logs[name] if measure in entry] for name in logs]
        assert values[0] and values[0] == pytest.approx(values[1], abs=1e-3 if measure == "margin" else 1e-4)
