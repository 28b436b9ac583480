"""A run killed (SIGKILL) at random moments, saves included, and resumed: the same bits each time.

    python -m tests.bench.kills OUTPUT.json [--kills 30] [--seed 0]

A tiny Stable Diffusion pipeline and twelve pairs. Each run is a process of its own, forked from one that has imported
everything. Every other one is killed in a save, after a random share of the time that the save before took. A line of the
log is a kill: when it came, whether a save was under way, the newest whole checkpoint then, and whether the resumed run's
weights and losses are those of the unbroken one.
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
from tests.conftest import rows as some_rows
from tests.contracts.families import stable_diffusion

STEPS = 6


def begun(config: TrainConfig, *, dies_in_save: tuple[int, float] | None = None) -> int:
    """A process that trains; its id. dies_in_save: in which save it is killed, and after which share of one's time."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            silent = os.open(f"{config.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            if dies_in_save:
                _doom(*dies_in_save)
            train(config)
            status = 0
        finally:
            os._exit(status)
    return process


def _doom(which: int, share: float) -> None:
    """From now on this process gets a SIGKILL in its `which`-th save, `share` of the last one's duration after its begin."""
    save, times = PreferenceTrainer._save_checkpoint, [0.0]

    def doomed(self: PreferenceTrainer, *given: Any) -> None:
        began, victim = time.monotonic(), os.getpid()
        if len(times) == which and os.fork() == 0:
            time.sleep(share * times[-1])
            os.kill(victim, signal.SIGKILL)
            os._exit(0)
        save(self, *given)
        times.append(time.monotonic() - began)

    PreferenceTrainer._save_checkpoint = doomed  # type: ignore[method-assign]


def finished(config: TrainConfig) -> None:
    _, status = os.waitpid(begun(config), 0)
    if status:
        raise RuntimeError(Path(f"{config.output_dir}.log").read_text()[-2000:])


def result(folder: Path) -> tuple[str, list[float]]:
    """A digest of the weights with their names and places, and the loss of every step.

    The file's notes on itself are left out: safetensors writes them in no fixed order.
    """
    data = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    begins = 8 + int.from_bytes(data[:8], "little")
    header = {name: place for name, place in json.loads(data[8:begins]).items() if name != "__metadata__"}
    weights = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data[begins:]).hexdigest()
    log = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return weights, [entry["loss"] for entry in log if "loss" in entry]


def killed(config: TrainConfig, rng: random.Random, *, in_save: bool, lasts: float) -> dict[str, Any] | None:
    """Start a run and have it killed; None where it ended before."""
    began, due = time.monotonic(), lasts * rng.random()
    process = begun(config, dies_in_save=(rng.randint(2, STEPS - 1), rng.random()) if in_save else None)
    gone, status = 0, 0
    while not gone:
        time.sleep(0.001)
        if not in_save and time.monotonic() - began > due:
            os.kill(process, signal.SIGKILL)
            due = float("inf")
        gone, status = os.waitpid(process, os.WNOHANG)
    if not os.WIFSIGNALED(status):
        return None
    return {"seconds": round(time.monotonic() - began, 2), "in a save": (Path(config.output_dir) / ".saving").exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as work:
        model, pairs = str(stable_diffusion(Path(work, "tiny"))), f"{work}/pairs.parquet"
        make_image_rows(some_rows(12)).to_parquet(pairs)
        config = TrainConfig(
            model, pairs, f"{work}/whole", steps=STEPS, batch_size=2, save_every=1, log_every=1, learning_rate=1e-3,
            eval_fraction=0.0, lora_rank=4,
        )  # fmt: skip
        began = time.monotonic()
        finished(config)
        lasts, whole = time.monotonic() - began, result(Path(config.output_dir))
        print(json.dumps({"unbroken": whole[0][:16], "seconds": round(lasts, 2)}), flush=True)
        while len(rows) < given.kills:
            cut = dataclasses.replace(config, output_dir=f"{work}/cut")
            shutil.rmtree(cut.output_dir, ignore_errors=True)
            row = killed(cut, rng, in_save=len(rows) % 2 == 0, lasts=lasts)
            if row is None:
                continue
            newest = latest_complete_checkpoint(Path(cut.output_dir))
            finished(dataclasses.replace(cut, resume=True))
            same = result(Path(cut.output_dir)) == whole
            rows.append({"kill": len(rows) + 1, **row, "newest": newest.name if newest else None, "same bits": same})
            print(json.dumps(rows[-1]), flush=True)
    command = shlex.join(["python", "-m", "tests.bench.kills", *sys.argv[1:]])
    given.out.write_text(json.dumps({"command": command, "steps": STEPS, "kills": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
