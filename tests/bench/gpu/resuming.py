"""Kill a run, resume it, and compare weights and log with an uninterrupted run, and that with its repetition."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_mm.config import TrainConfig
from dpo_mm.training.checkpoints import LOG_FILE, latest_complete_checkpoint
from tests.bench.gpu.cells import Cells

PATIENCE = 180.0
"""Seconds that a run may take."""


def compare(cells: Cells) -> None:
    """Four runs with equal settings: whole, whole again, killed after its first checkpoint, and resumed from there."""
    with tempfile.TemporaryDirectory() as work:
        config = _config(cells, Path(work))
        runs = {name: _in_folder(config, f"{work}/{name}") for name in ("whole", "again", "cut")}
        for name in ("whole", "again"):
            cells.measure(name, lambda name=name: {"seconds": _run(cells, runs[name])})
        cells.measure("killed", lambda: _kill(cells, runs["cut"]))
        cells.measure("resumed", lambda: {"seconds": _run(cells, runs["cut"])})
        folders = {name: Path(run.output_dir) for name, run in runs.items()}
        cells.measure("resumed and whole", lambda: _difference(folders["cut"], folders["whole"]))
        cells.measure("whole and again", lambda: _difference(folders["whole"], folders["again"]))


def _config(cells: Cells, work: Path) -> TrainConfig:
    settings = cells.settings
    run = {"log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, **settings["run"]}
    if not cells.tiny:
        return TrainConfig(output_dir="", **run)
    from dpo_mm.data.schema import make_image_rows
    from tests.conftest import rows
    from tests.contracts.families import stable_diffusion

    pairs = work / "pairs.parquet"
    make_image_rows(rows(8)).to_parquet(pairs)
    return TrainConfig(str(stable_diffusion(work / "tiny")), str(pairs), "", **run)


def _in_folder(config: TrainConfig, folder: str) -> TrainConfig:
    return TrainConfig(**{**vars(config), "output_dir": folder})


def _train(config: TrainConfig) -> None:
    """Train in this process, with its output in a file next to the run."""
    from dpo_mm.training.run import train

    with open(f"{config.output_dir}.log", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        train(config)


def _start(cells: Cells, config: TrainConfig) -> Any:
    """Start a run in a new process. After a fork CUDA cannot be used, so on a GPU it is a fresh interpreter."""
    context: Any = multiprocessing.get_context("spawn" if cells.device == "cuda" else "fork")
    process = context.Process(target=_train, args=(config,))
    process.start()
    return process


def _run(cells: Cells, config: TrainConfig) -> float:
    """Train to the end. Returns the seconds."""
    start = time.monotonic()
    process = _start(cells, config)
    process.join(PATIENCE)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"exit code {process.exitcode}: {Path(f'{config.output_dir}.log').read_text()[-300:]}")
    return time.monotonic() - start


def _kill(cells: Cells, config: TrainConfig) -> dict[str, Any]:
    """Start a run and kill it as soon as a checkpoint is complete."""
    start = time.monotonic()
    process = _start(cells, config)
    while latest_complete_checkpoint(Path(config.output_dir)) is None:
        if not process.is_alive() or time.monotonic() - start > PATIENCE:
            process.kill()
            raise RuntimeError(f"no checkpoint: {Path(f'{config.output_dir}.log').read_text()[-300:]}")
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    newest = latest_complete_checkpoint(Path(config.output_dir))
    return {"exit_code": process.exitcode, "checkpoint": newest.name if newest else None}


def _difference(one: Path, other: Path) -> dict[str, Any]:
    """How the results of two runs differ: largest difference of a weight, and of each number of the log."""
    from safetensors.torch import load_file

    weights, expected = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other))
    largest = max(float((weights[name].float() - expected[name].float()).abs().max()) for name in expected)
    moved = max(float(value.float().abs().max()) for value in expected.values())
    logs = [_log(folder) for folder in (one, other)]
    same = [a == b for a, b in zip(*logs, strict=True)]
    return {
        "same_bits": largest == 0,
        "largest_difference": largest,
        "largest_weight": moved,
        "log_lines": len(same),
        "equal_log_lines": sum(same),
        "losses": [[entry["loss"] for entry in log] for log in logs],
    }


def _log(folder: Path) -> list[dict[str, float]]:
    """Lines of the log with a loss."""
    log = json.loads((folder / LOG_FILE).read_text())
    return [entry for entry in log["history"] if "loss" in entry]
