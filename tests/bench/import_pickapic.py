"""Import of synthetic rows in Pick-a-Pic's schema: rows a second, and whether memory stays flat.

    python -m tests.bench.import_pickapic --out docs/benchmarks/import.json                # 100,000 rows of two JPEGs
    python -m tests.bench.import_pickapic --rows 5000 --picture 512                        # larger pictures

The set is written as the real one is, in many Parquet files; the import runs in a process of its own, whose memory
is looked at ten times a second. The doctor is then run on what came out of it, in another.
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

FILE = 2000
"""Rows of a Parquet file of the set."""


def jpegs(count: int, side: int) -> list[bytes]:
    """Pictures of smooth noise, all different."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def write_set(folder: Path, rows: int, side: int) -> int:
    """Write the set and give its bytes. A twelfth of the labels are ties; each row's pictures are its own."""
    rng, pictures = np.random.default_rng(1), jpegs(2000, side)
    for start in range(0, rows, FILE):
        numbers = range(start, min(rows, start + FILE))
        labels = rng.choice([0.0, 0.5, 1.0], len(numbers), p=[0.46, 0.08, 0.46])
        # a comment after the end of a JPEG makes another file of the same picture
        files = [[pictures[rng.integers(len(pictures))] + f"{n}-{s}".encode() for n in numbers] for s in range(2)]
        columns = {
            "are_different": [True] * len(numbers),
            "best_image_uid": ["x"] * len(numbers),
            "caption": [f"a prompt of some length, number {n // 3}, as people write them" for n in numbers],
            "has_label": [True] * len(numbers),
            "jpg_0": files[0],
            "jpg_1": files[1],
            "label_0": labels,
            "label_1": 1 - labels,
            "model_0": [f"model {n % 4}" for n in numbers],
            "model_1": [f"model {(n + 1) % 4}" for n in numbers],
            "ranking_id": list(numbers),
            "user_id": [n % 4000 for n in numbers],
            "num_example_per_prompt": [3] * len(numbers),
        }
        pq.write_table(pa.table(columns), folder / f"train-{start // FILE:05}-of-{-(-rows // FILE):05}.parquet")
    return sum(file.stat().st_size for file in folder.glob("*.parquet"))


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command; seconds, CPU seconds, and its memory (MB, private to it) at each tenth of the way and at most."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen, cpu = [], 0.0
    watcher = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            info, times = watcher.memory_info(), watcher.cpu_times()
            seen.append((info.rss - getattr(info, "shared", 0)) / 2**20)
            cpu = times.user + times.system
        except psutil.Error:
            break
        time.sleep(0.1)
    process.wait()
    tenths = [round(max(seen[len(seen) * n // 10 : len(seen) * (n + 1) // 10] or [0])) for n in range(10)]
    return {
        "exit_status": process.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_megabytes": round(max(seen)),
        "megabytes_by_tenth": tenths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--picture", type=int, default=128, help="pixels a side")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dpo-mm-bench-"))
    try:
        (folder / "set").mkdir()
        size = write_set(folder / "set", given.rows, given.picture)
        tool = [sys.executable, "-m", "dpo_mm"]
        steps = {
            "import": [*tool, "import", "pickapic", str(folder / "set"), str(folder / "out")],
            "doctor": [*tool, "doctor", str(folder / "out"), "--output", str(folder / "report.html")],
        }
        found: dict[str, Any] = {
            "command": " ".join(["python -m tests.bench.import_pickapic", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}",
            "rows": given.rows,
            "set_megabytes": round(size / 2**20),
        }
        for name, command in steps.items():
            found[name] = watched(command)
            for unit in ("seconds", "cpu_seconds"):
                found[name][f"rows_per_{unit.removesuffix('s')}"] = round(given.rows / found[name][unit])
        print(json.dumps(found, indent=1))
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
