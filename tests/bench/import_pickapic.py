"""Import synthetic rows with Pick-a-Pic's schema, and measure rows per second and memory over time.

    python -m tests.bench.import_pickapic --out docs/benchmarks/import.json                # 100,000 rows of two JPEGs
    python -m tests.bench.import_pickapic --rows 5000 --image-size 512                     # larger images

Like the real dataset, the synthetic one has many Parquet files. The import runs in a separate process, whose memory is
sampled ten times per second. The doctor then runs on the result in another process.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS_PER_FILE = 2000
"""Rows per Parquet file of the dataset."""


def jpegs(count: int, edge: int) -> list[bytes]:
    """JPEG files of smooth noise, all different, `edge` pixels wide and high."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((edge, edge), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def write_dataset(folder: Path, rows: int, edge: int) -> int:
    """Write the dataset and return its size in bytes.

    A twelfth of the labels are ties. No two rows have the same image files.
    """
    rng, images = np.random.default_rng(1), jpegs(2000, edge)
    for start in range(0, rows, ROWS_PER_FILE):
        row_numbers = range(start, min(rows, start + ROWS_PER_FILE))
        labels = rng.choice([0.0, 0.5, 1.0], len(row_numbers), p=[0.46, 0.08, 0.46])
        # bytes after the end of a JPEG make a different file of the same image
        files = [[images[rng.integers(len(images))] + f"{n}-{side}".encode() for n in row_numbers] for side in range(2)]
        columns = {
            "are_different": [True] * len(row_numbers),
            "best_image_uid": ["x"] * len(row_numbers),
            "caption": [f"a prompt of some length, number {n // 3}, as people write them" for n in row_numbers],
            "has_label": [True] * len(row_numbers),
            "jpg_0": files[0],
            "jpg_1": files[1],
            "label_0": labels,
            "label_1": 1 - labels,
            "model_0": [f"model {n % 4}" for n in row_numbers],
            "model_1": [f"model {(n + 1) % 4}" for n in row_numbers],
            "ranking_id": list(row_numbers),
            "user_id": [n % 4000 for n in row_numbers],
            "num_example_per_prompt": [3] * len(row_numbers),
        }
        pq.write_table(
            pa.table(columns), folder / f"train-{start // ROWS_PER_FILE:05}-of-{-(-rows // ROWS_PER_FILE):05}.parquet"
        )
    return sum(file.stat().st_size for file in folder.glob("*.parquet"))


def run_and_measure(command: list[str]) -> dict[str, Any]:
    """Run a command and measure its seconds, CPU seconds and private memory.

    The memory (MiB) is the maximum of each tenth of the run, and of the whole run.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory, cpu = [], 0.0
    measured_process = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            info, times = measured_process.memory_info(), measured_process.cpu_times()
            memory.append((info.rss - getattr(info, "shared", 0)) / 2**20)
            cpu = times.user + times.system
        except psutil.Error:
            break
        time.sleep(0.1)
    process.wait()
    tenths = [round(max(memory[len(memory) * n // 10 : len(memory) * (n + 1) // 10] or [0])) for n in range(10)]
    return {
        "exit_status": process.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_megabytes": round(max(memory)),
        "megabytes_by_tenth": tenths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--image-size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dpo-mm-bench-"))
    try:
        (folder / "set").mkdir()
        size = write_dataset(folder / "set", options.rows, options.image_size)
        program = [sys.executable, "-m", "dpo_mm"]
        steps = {
            "import": [*program, "import", "pickapic", str(folder / "set"), str(folder / "out")],
            "doctor": [*program, "doctor", str(folder / "out"), "--output", str(folder / "report.html")],
        }
        report: dict[str, Any] = {
            "command": " ".join(["python -m tests.bench.import_pickapic", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}",
            "rows": options.rows,
            "set_megabytes": round(size / 2**20),
        }
        for name, command in steps.items():
            report[name] = run_and_measure(command)
            for unit in ("seconds", "cpu_seconds"):
                report[name][f"rows_per_{unit.removesuffix('s')}"] = round(options.rows / report[name][unit])
        print(json.dumps(report, indent=1))
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
