"""Kill a run with SIGKILL at random moments, saves included, resume it, and check that the weights are bit-identical.

    python -m tests.bench.kills OUTPUT.json [--kills 30] [--seed 0]

It trains a tiny Stable Diffusion pipeline on twelve pairs. Each run is a separate process, forked from one that has
imported everything. Every other run is killed during a save, after a random fraction of the previous save's duration. A
row of the log has the time of the kill, whether a save was in progress, the newest complete checkpoint at that time, and
whether the resumed run's weights and losses equal those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_image_rows
from dpo_mm.training.checkpoints import latest_complete_checkpoint
from dpo_mm.training.run import train
from dpo_mm.training.trainer import PreferenceTrainer
from tests.conftest import rows as example_rows
from tests.contracts.families import stable_diffusion

STEPS = 6


def start_run(config: TrainConfig, *, killed_in_save: tuple[int, float] | None = None) -> int:
    """Start a process that trains and return its id.

    killed_in_save: number of the save in which it is killed, and the fraction of a save's duration before the kill.
    """
    process = os.fork()
    if process == 0:
        status = 1
        try:
            silent = os.open(f"{config.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            if killed_in_save:
                _kill_in_save(*killed_in_save)
            train(config)
            status = 0
        finally:
            os._exit(status)
    return process


def _kill_in_save(number: int, fraction: float) -> None:
    """Make this process receive SIGKILL in its `number`-th save.

    fraction: fraction of the previous save's duration between the begin of the save and the kill.
    """
    save, times = PreferenceTrainer._save_checkpoint, [0.0]

    def save_and_kill(self: PreferenceTrainer, *arguments: Any) -> None:
        start, process = time.monotonic(), os.getpid()
        if len(times) == number and os.fork() == 0:
            time.sleep(fraction * times[-1])
            os.kill(process, signal.SIGKILL)
            os._exit(0)
        save(self, *arguments)
        times.append(time.monotonic() - start)

    PreferenceTrainer._save_checkpoint = save_and_kill  # type: ignore[method-assign]


def run_to_the_end(config: TrainConfig) -> None:
    """Train in a separate process. Raises RuntimeError with its log if it fails."""
    _, status = os.waitpid(start_run(config), 0)
    if status:
        raise RuntimeError(Path(f"{config.output_dir}.log").read_text()[-2000:])


def digest_and_losses(folder: Path) -> tuple[str, list[float]]:
    """Return a digest of the file of the weights, and the loss of every step."""
    weights = hashlib.sha256((folder / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    log = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return weights, [entry["loss"] for entry in log if "loss" in entry]


def kill_run(config: TrainConfig, rng: random.Random, *, in_save: bool, duration: float) -> dict[str, Any] | None:
    """Start a run and kill it. Returns the log's entries, or None if the run ended before the kill.

    duration: seconds that the uninterrupted run took.
    """
    start, kill_after = time.monotonic(), duration * rng.random()
    process = start_run(config, killed_in_save=(rng.randint(2, STEPS - 1), rng.random()) if in_save else None)
    ended, status = 0, 0
    while not ended:
        time.sleep(0.001)
        if not in_save and time.monotonic() - start > kill_after:
            os.kill(process, signal.SIGKILL)
            kill_after = float("inf")
        ended, status = os.waitpid(process, os.WNOHANG)
    if not os.WIFSIGNALED(status):
        return None
    return {"seconds": round(time.monotonic() - start, 2), "in a save": (Path(config.output_dir) / ".saving").exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as work:
        model, pairs = str(stable_diffusion(Path(work, "tiny"))), f"{work}/pairs.parquet"
        make_image_rows(example_rows(12)).to_parquet(pairs)
        config = TrainConfig(
            model, pairs, f"{work}/whole", steps=STEPS, batch_size=2, save_every=1, log_every=1, learning_rate=1e-3,
            eval_fraction=0.0, lora_rank=4,
        )  # fmt: skip
        start = time.monotonic()
        run_to_the_end(config)
        duration, expected = time.monotonic() - start, digest_and_losses(Path(config.output_dir))
        print(json.dumps({"unbroken": expected[0][:16], "seconds": round(duration, 2)}), flush=True)
        while len(rows) < options.kills:
            interrupted = dataclasses.replace(config, output_dir=f"{work}/cut")
            shutil.rmtree(interrupted.output_dir, ignore_errors=True)
            row = kill_run(interrupted, rng, in_save=len(rows) % 2 == 0, duration=duration)
            if row is None:
                continue
            newest = latest_complete_checkpoint(Path(interrupted.output_dir))
            run_to_the_end(interrupted)
            identical = digest_and_losses(Path(interrupted.output_dir)) == expected
            rows.append(
                {"kill": len(rows) + 1, **row, "newest": newest.name if newest else None, "same bits": identical}
            )
            print(json.dumps(rows[-1]), flush=True)
    command = shlex.join(["python", "-m", "tests.bench.kills", *sys.argv[1:]])
    options.out.write_text(json.dumps({"command": command, "steps": STEPS, "kills": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
