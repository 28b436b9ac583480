"""Two processes train on the pairs and noise of one process and give the same losses, and compare what one compares."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_mm.config import TrainConfig, as_dict
from dpo_mm.data.image_files import encode_png
from dpo_mm.training.run import train
from tests import forked
from tests.conftest import noise_image, rows
from tests.reliability import commands

pytestmark = pytest.mark.slow

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
"""The command that `accelerate launch` runs for several processes.

One test runs it, with forked commands. The others fork the processes that it would start.
"""
ROOT = Path(__file__).parents[2]
COMMON = ["--steps", "4", "--save-every", "4", "--log-every", "1", "--learning-rate", "1e-3", "--eval-fraction", "0.34"]


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("objective", ["sigmoid", "kto"])
def test_two_processes_give_the_losses_of_one(objective: str, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\npairs: {pairs}\nobjective: {objective}\nbeta: 100\nstratified_timesteps: true\n"
    )
    command = ["train", str(recipe), *COMMON]
    forked.run(*command, "--batch-size", "4", "--output-dir", str(tmp_path / "one"), check=True)
    forked.run_together(*command, "--batch-size", "2", "--output-dir", str(tmp_path / "two"))
    single, double = history(tmp_path / "one"), history(tmp_path / "two")
    for name in ("loss", "rewards/accuracies", "rewards/margins", "errors/chosen"):
        values = [[entry[name] for entry in log if name in entry] for log in (single, double)]
        assert len(values[0]) == 4 and values[0] == pytest.approx(
            values[1], abs=1e-4 if name == "rewards/margins" else 1e-5
        )
    assert (tmp_path / "two" / "pytorch_lora_weights.safetensors").exists()


def test_buckets_come_in_the_same_order_on_two_processes(
    tiny_model: str, write_pairs: Callable[..., str], tmp_path: Path
) -> None:
    """Two processes make the same steps as one with two accumulated batches. Each process encodes separate shards."""
    examples = rows(10)
    for number, row in enumerate(examples):
        size = [(32, 32), (80, 48), (48, 80)][number % 3]
        for offset, side in enumerate(("image_a", "image_b")):
            row[side] = {"bytes": encode_png(noise_image(2 * number + offset, 64).resize(size)), "path": None}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {write_pairs(examples)}\nbeta: 500\nbuckets: true\nbatch_size: 2\n")
    logs = {}
    for name, count, accumulate in (("one", 1, "2"), ("two", 2, "1")):
        command = ["train", str(recipe), *COMMON, "--accumulate", accumulate, "--output-dir", str(tmp_path / name)]
        forked.run_together(*command, count=count, env={**os.environ, "DPO_MM_CACHE": str(tmp_path / name)})
        logs[name] = history(tmp_path / name)
    for key in ("loss", "rewards/margins"):
        values = [[entry[key] for entry in logs[name] if key in entry] for name in logs]
        assert values[0] and values[0] == pytest.approx(values[1], abs=1e-3 if key == "rewards/margins" else 1e-4)


def test_sigterm_to_one_of_two_processes_stops_both_and_one_process_resumes(
    tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    """Mutation that it catches: each process checks only its own signal, and the save waits for ever."""
    import psutil

    uninterrupted = TrainConfig(
        tiny_model, pairs, str(tmp_path / "whole"), steps=6, batch_size=4, save_every=2, log_every=1,
        learning_rate=1e-3, beta=100, eval_fraction=0, stratified_timesteps=True,
    )  # fmt: skip
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "two"
    settings = as_dict(uninterrupted) | {"output_dir": str(out), "batch_size": 2, "steps": 400, "save_every": 1}
    recipe.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}))
    launcher = subprocess.Popen(
        [*TWO_PROCESSES, "-m", "tests.forked", "train", str(recipe)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(out.glob("checkpoint-*")) and launcher.poll() is None:
        time.sleep(0.01)
    workers = [child for child in psutil.Process(launcher.pid).children() if "tests.forked" in child.cmdline()]
    workers[1].send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=300)
    assert errors.count("stopped after step") == 2, errors[-3000:]
    step = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert f"stopped after step {step} and" in errors and step < 400
    longer = dataclasses.replace(uninterrupted, steps=step + 2, save_every=0)
    resumed = train(dataclasses.replace(longer, output_dir=str(out), resume=True))
    losses = [[e["loss"] for e in run.history if "loss" in e] for run in (train(longer), resumed)]
    assert len(losses[0]) == step + 2 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_compare_what_one_compares(tmp_path: Path) -> None:
    """Each makes its share, also after one of them was killed.

    Mutation that it catches: every process generates all of it, or a result has a row twice.
    """
    inputs = tmp_path / "inputs"
    commands.write_inputs(inputs)
    made = {
        "compare images": ("compared", "pictures/manifest.jsonl"),
        "compare responses": ("answers", "answers.jsonl"),
    }
    for name, (folder, table) in made.items():
        one, two = (commands.commands(inputs, tmp_path / count)[name] for count in ("one", "two"))
        env = commands.environment(tmp_path / "cache")
        forked.run(*one, env=env, check=True)
        killed, other = forked.start_together(*two, env=env)
        other.kill()
        part = Path(tmp_path / "two" / folder / table)
        while not part.is_file() and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
        done = forked.run_together(*two, env=env)
        assert "Verdict" in done[0].stdout and "Verdict" not in done[1].stdout
        results = [json.loads((tmp_path / count / folder / "metrics.json").read_text()) for count in ("one", "two")]
        assert results[0]["comparisons"] == results[1]["comparisons"] and results[0]["control"] == results[1]["control"]
        lines = [(tmp_path / count / folder / table).read_text().splitlines() for count in ("one", "two")]
        assert len(lines[0]) == len(lines[1]) and not list((tmp_path / "two" / folder).rglob("*-part*"))
