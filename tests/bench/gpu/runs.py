"""Whole runs of an image generator through `dpo_mm.train`: time per step with loading, optimizer and log, and peak memory."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_image_rows
from dpo_mm.training.run import train
from tests.bench.diffusion_step import build, rows_of
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import MIB
from tests.bench.gpu.models import image_size


def through_train(cells: Cells) -> None:
    """Each run twice, with few steps and with more. Their difference is free of the start and the end."""
    settings = cells.settings
    size = image_size(settings["model"], tiny=cells.tiny)
    with tempfile.TemporaryDirectory() as work:
        model, pairs = f"{work}/model", f"{work}/pairs.parquet"
        build(size, device=cells.device, precision=settings["precision"]).pipe.save_pretrained(model)
        make_image_rows(rows_of(size, settings["rows"])).to_parquet(pairs)
        common = {"beta": 2000.0, "eval_fraction": 0.0, "log_every": 1000, "batch_size": settings["pairs"]}

        def run(options: dict[str, Any]) -> dict[str, Any]:
            seconds = []
            for steps in settings["steps"]:
                folder = Path(work, "run")
                shutil.rmtree(folder, ignore_errors=True)
                if cells.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                train(TrainConfig(model, pairs, str(folder), **{**common, **options, "steps": steps}))
                seconds.append(time.perf_counter() - start)
            few, more = settings["steps"]
            return {
                "ms": 1000 * (seconds[1] - seconds[0]) / (more - few),
                "seconds": seconds,
                "peak_mib": torch.cuda.max_memory_allocated() / MIB if cells.device == "cuda" else None,
            }

        for name, options in settings["runs"].items():
            cells.measure(name, lambda options=options: run(options))
