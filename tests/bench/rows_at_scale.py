"""Memory and waiting time of a vision-language run with many rows, by number of rows and of loader processes.

    python -m tests.bench.rows_at_scale --rows 200 20000 --workers 0 2 --out docs/benchmarks/rows-at-scale.json

The model is a tiny Qwen2.5-VL, so that rows decide. Images are JPEG files of --edge pixels in a Parquet file. Each run is a
process of its own: it encodes or measures the rows, then takes --steps batches of two pairs from the Trainer's loader and
waits --think seconds after each, as a step on a GPU would. The first batch is the start of the loader and is reported by
itself. `peak_mib` is the largest memory of the main process without files that are mapped into it, and `more_mib` what it is above the
run with the fewest rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SIZES = ((640, 480), (480, 640), (640, 427), (500, 375), (612, 612))
"""Sizes of COCO's photos, scaled by --edge / 640."""


def write_pairs(path: Path, count: int, edge: int) -> None:
    """Write response pairs with one JPEG each, in row groups of 200."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    from dpo_mm.data.schema import make_response_rows

    rng, writer = np.random.default_rng(0), None
    for start in range(0, count, 200):
        rows = []
        for number in range(start, min(start + 200, count)):
            width, height = (round(side * edge / 640) for side in SIZES[number % len(SIZES)])
            small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            rows.append(
                {
                    "id": str(number),
                    "images": [{"bytes": file.getvalue(), "path": None}],
                    "prompt": "describe the picture",
                    "chosen": f"a red square on a blue field {'with text ' * (number % 7)}",
                    "rejected": "a red circle",
                }
            )
        table = make_response_rows(rows).data.table
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


class PeakMemory(threading.Thread):
    """Largest anonymous memory of this process, MiB. Pages of mapped files are not counted: they can be dropped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.mib = max(self.mib, int(status.split("RssAnon:")[1].split()[0]) / 1024)
            time.sleep(0.02)


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure one run. It is called in a fresh process."""
    import datasets
    import torch
    from transformers.utils import logging

    from dpo_mm.config import TrainConfig
    from dpo_mm.training import response_rows
    from dpo_mm.training.builders import build_policy
    from dpo_mm.training.encoding import encode_splits
    from dpo_mm.training.trainer import PreferenceTrainer

    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn its loader processes too
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    peak = PeakMemory()
    peak.start()
    torch.set_num_threads(1)
    if arguments["in_memory"]:
        response_rows.MAX_BYTES_IN_MEMORY = 2**50
    config = TrainConfig(
        arguments["model"], arguments["pairs"], arguments["output"],
        eval_fraction=0.0, steps=arguments["steps"], batch_size=2, beta=0.1, workers=arguments["workers"],
    )  # fmt: skip
    policy = build_policy(config)
    start = time.perf_counter()
    splits = encode_splits(policy, config)
    measured = time.perf_counter() - start
    policy.prepare(config)
    trainer = PreferenceTrainer(policy, config, splits.rows, None)
    waits = []
    start = time.perf_counter()
    for _ in trainer.get_train_dataloader():
        waits.append(time.perf_counter() - start)
        time.sleep(arguments["think"])
        start = time.perf_counter()
    (row, *_) = (splits.rows[0],)
    return {
        "rows": len(splits.rows),
        "streamed": isinstance(splits.rows, response_rows.StreamedRows),
        "workers": arguments["workers"],
        "row_mib": round(response_rows.encoded_bytes(row) / 2**20, 2),
        "seconds_before_first_step": round(measured, 1),
        "first_batch_s": round(waits[0], 2),
        "wait_per_step_s": round(float(np.mean(waits[1:])), 4),
        "peak_mib": round(peak.mib),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200, 2000, 20000])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--edge", type=int, default=640)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--think", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from tests.contracts.tiny_vlms import save

    results: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save("qwen2_5_vl", folder / "model")
        for count in sorted(options.rows):
            pairs = folder / f"{count}.parquet"
            write_pairs(pairs, count, options.edge)
            runs = [(workers, False) for workers in options.workers]
            if count == min(options.rows):
                runs.append((0, True))
            for workers, in_memory in runs:
                os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
                os.environ["DPO_MM_CACHE"] = str(
                    folder / f"cache-{count}-{workers}"
                )  # each run measures the rows itself
                arguments = {
                    "model": model, "pairs": str(pairs), "output": str(folder / "run"), "steps": options.steps,
                    "think": options.think, "workers": workers, "in_memory": in_memory,
                }  # fmt: skip
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    result = pool.submit(run, arguments).result()
                results.append({**result, "file_mib": round(pairs.stat().st_size / 2**20)})
                print(json.dumps(results[-1]), flush=True)
            pairs.unlink()
    least = {r["workers"]: r["peak_mib"] for r in results if r["rows"] == min(options.rows) and r["streamed"]}
    for result in results:
        if result["streamed"]:
            result["more_mib"] = result["peak_mib"] - least[result["workers"]]
    if options.out:
        options.out.write_text(json.dumps({"edge": options.edge, "think_s": options.think, "runs": results}, indent=1))


if __name__ == "__main__":
    main()
