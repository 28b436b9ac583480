"""Measure import, doctor, questions, reports, labelling, encoding and mining at the size of real jobs.

    python -m tests.bench.real_size questions --out docs/benchmarks/real-size.json
    python -m tests.bench.real_size import doctor labels report --out docs/benchmarks/real-size.json --work WORK_FOLDER

Each part is measured in other processes and replaces its entry in the file. `import` and `doctor` take minutes. Their inputs
and the unfinished import are in --work, and the same command resumes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.import_pickapic import run_and_measure, write_dataset
from tests.bench.import_rows import chat_row, write_lines

PROGRAM = [sys.executable, "-m", "dpo_mm"]


def measure_import(work: Path, scale: float) -> dict[str, Any]:
    """Import 1,000,000 chat rows from JSON lines once."""
    rows = int(1_000_000 * scale)
    source, output = work / "chat.jsonl", work / "imported"
    if not source.is_file():
        write_lines(work / "unfinished.jsonl", (chat_row(number) for number in range(rows)))
        (work / "unfinished.jsonl").replace(source)
    measured = run_and_measure([*PROGRAM, "import", "trl", str(source), str(output)])
    files = [pq.ParquetFile(file) for file in sorted(output.glob("*.parquet"))]
    return {
        "rows": sum(file.metadata.num_rows for file in files),
        **measured,
        "rows_per_cpu_second": round(rows / measured["cpu_seconds"]),
        "source_mib": round(source.stat().st_size / 2**20),
        "written_mib": round(sum(file.stat().st_size for file in output.glob("*.parquet")) / 2**20),
        "files": len(files),
        "row_groups": sum(file.num_row_groups for file in files),
    }


def measure_doctor(work: Path, scale: float) -> dict[str, Any]:
    """Run the doctor on 10,000, 30,000 and 100,000 pairs of small JPEGs, and on a tenth of the pairs with larger ones."""
    result: dict[str, Any] = {}
    for pairs, edge in ((10_000, 64), (30_000, 64), (100_000, 64), (1_000, 512)):
        pairs = int(pairs * scale)
        folder = work / f"pairs-{pairs}-{edge}"
        if not (folder / "out/import.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "set").mkdir(parents=True)
            write_dataset(folder / "set", pairs, edge)
            subprocess.run([*PROGRAM, "import", "pickapic", str(folder / "set"), str(folder / "out")], check=True)
        measured = run_and_measure([*PROGRAM, "doctor", str(folder / "out"), "--output", str(folder / "report.html")])
        size = sum(file.stat().st_size for file in (folder / "out").glob("*.parquet")) / 2**20
        result[f"{pairs} pairs of {edge} pixels"] = {"pairs": pairs, "set_mib": round(size), **measured}
    first, *_, last, _ = result.values()
    growth = math.log(last["cpu_seconds"] / first["cpu_seconds"])
    return {**result, "exponent_of_cpu_seconds": round(growth / math.log(last["pairs"] / first["pairs"]), 2)}


MEASURE_QUESTIONS = """
import sys, threading, time
from tests.bench.rows_at_scale import PeakMemory
import datasets, pyarrow.parquet, torch, transformers
from dpo_mm.files.content_key import content_hash
from dpo_mm.data.questions import read_questions
peak = PeakMemory(); peak.start(); time.sleep(0.1)
start, cpu = time.perf_counter(), time.process_time()
questions = read_questions(sys.argv[1])
key = content_hash([question.content for question in questions])
batch = [list(question.images) for question in questions[:16]]
time.sleep(0.1)
print(len(questions), peak.mib, time.perf_counter() - start - 0.1, time.process_time() - cpu)
"""


def measure_questions(work: Path, scale: float) -> dict[str, Any]:
    """Load questions with one image of 640 x 480 each, up to the decoded images of the first batch of 16."""
    result: dict[str, Any] = {}
    for count in (int(n * scale) for n in (200, 2000, 20_000)):
        for kind in ("parquet", "jsonl"):
            path = write_questions(work / f"questions-{count}", count, kind)
            words = [sys.executable, "-c", MEASURE_QUESTIONS, str(path)]
            environment = {**os.environ, "DPO_MM_CACHE": str(work / "cache")}
            done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
            rows, peak, seconds, cpu = map(float, done.stdout.split()[-4:])
            assert rows == count
            result[f"{count}, {kind}"] = {
                "peak_mib": round(peak),
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu, 1),
            }
    for kind in ("parquet", "jsonl"):
        peaks = [entry["peak_mib"] for name, entry in result.items() if name.endswith(kind)]
        result[f"more_mib_{kind}"] = peaks[-1] - peaks[0]
    return result


def write_questions(folder: Path, count: int, kind: str) -> Path:
    """Write questions with JPEGs of smooth noise, in Parquet or as JSON lines with files next to them."""
    path = folder / f"questions.{kind}"
    if path.is_file():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files = photos(100)
    texts = lambda n: {"id": str(n), "prompt": f"Question {n}: what is in this image?", "ground_truth": "a field"}
    file = lambda n: files[n % 100] + str(n).encode()  # bytes after the end of a JPEG make a different file
    if kind == "jsonl":
        for number in range(count):
            (folder / f"images/{number}.jpg").write_bytes(file(number))
        write_lines(path, ({**texts(n), "images": [f"images/{n}.jpg"]} for n in range(count)))
        return path
    import pyarrow as pa

    writer = None
    for start in range(0, count, 200):
        rows = [
            {**texts(n), "images": [{"bytes": file(n), "path": None}]} for n in range(start, min(count, start + 200))
        ]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return path


def photos(count: int) -> list[bytes]:
    """JPEG files of 640 x 480 pixels, about 90 kB each."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


MEASURE_LABELS = """
import sys, time
from pathlib import Path
from tests.bench.rows_at_scale import PeakMemory
from tests.bench.votes import fill
import datasets, gradio, pyarrow.parquet
from dpo_mm.labels.export import export
from dpo_mm.labels.pairs import open_pairs, pair_digest
from dpo_mm.labels.store import VoteStore
peak = PeakMemory(); peak.start()
clock, times = time.perf_counter, []
for _ in range(2):
    start = clock()
    rows = open_pairs(sys.argv[1])
    store = VoteStore(sys.argv[2] + "/votes.sqlite", rows["id"], source=sys.argv[1], stays_open=True)
    row_numbers = {pair: number for number, pair in enumerate(rows["id"])}
    opened, start = clock() - start, clock()
    shown = store.next_pair("first", "browser")
    row = rows[row_numbers[shown.pair]]
    store.record_digest(row["id"], pair_digest(row))
    times.append((opened, clock() - start))
page_mib = peak.mib
fill(store, len(rows))
for kind, name in (("rows", "votes.parquet"), ("argilla", "votes.json")):
    start = clock()
    export(sys.argv[2] + "/votes.sqlite", sys.argv[2] + "/" + name, format=kind)
    times.append((clock() - start, Path(sys.argv[2], name).stat().st_size / 2**20))
print(*(value for pair in times for value in pair), page_mib, peak.mib)
"""


def measure_labels(work: Path, scale: float) -> dict[str, Any]:
    """Open the label page's pairs and votes, show the first pair, and export a vote per pair."""
    pairs = int(80_000 * scale)
    source = work / f"label-{pairs}"
    if not (source / "out/import.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        (source / "set").mkdir(parents=True)
        write_dataset(source / "set", pairs, 128)
        subprocess.run([*PROGRAM, "import", "pickapic", str(source / "set"), str(source / "out")], check=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        words = [sys.executable, "-c", MEASURE_LABELS, str(source / "out"), folder]
        environment = {**os.environ, "DPO_MM_CACHE": f"{folder}/cache"}
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    names = ("open_first_s", "first_pair_s", "open_again_s", "first_pair_again_s", "export_parquet_s", "parquet_mib")
    names += ("export_argilla_s", "argilla_mib", "page_peak_mib", "peak_mib")
    size = sum(file.stat().st_size for file in (source / "out").glob("*.parquet")) / 2**20
    values = (round(float(value), 2) for value in done.stdout.split()[-len(names) :])
    return {"pairs": pairs, "set_mib": round(size), **dict(zip(names, values, strict=True))}


def measure_report(work: Path, scale: float) -> dict[str, Any]:
    """Compare images of 512 pixels from files and responses without a model, with 5,000 prompts."""
    prompts = int(5000 * scale)
    result = {}
    for kind in ("images", "responses"):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            words = [sys.executable, "-m", "tests.bench.report_size", kind, str(prompts), folder]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
        result[kind] = json.loads(done.stdout.splitlines()[-1])
    return {"prompts": prompts, **result}


def measure_growth(work: Path, scale: float) -> dict[str, Any]:
    """Encode and mine two numbers of rows, and compute the exponent of the CPU seconds."""
    result: dict[str, Any] = {}
    for kind in ("encode", "mine"):
        sizes, seconds = [int(n * scale) for n in (500, 2000)], []
        for count in sizes:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                words = [sys.executable, "-m", "tests.bench.growth", kind, str(count), folder]
                environment = {**os.environ, "DPO_MM_CACHE": f"{folder}/cache"}
                done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
            seconds.append(float(done.stdout.split()[-1]))
        exponent = math.log(seconds[1] / seconds[0]) / math.log(sizes[1] / sizes[0])
        result[kind] = {
            "rows": sizes,
            "cpu_seconds": [round(value, 2) for value in seconds],
            "exponent": round(exponent, 2),
        }
    return result


PARTS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "import": measure_import,
    "doctor": measure_doctor,
    "questions": measure_questions,
    "labels": measure_labels,
    "report": measure_report,
    "growth": measure_growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the rows, to try the program")
    parser.add_argument("--work", type=Path, help="folder for inputs and unfinished results")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="dpo-mm-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        start = time.time()
        measured = PARTS[part](work, options.scale)
        print(part, json.dumps(measured), f"{time.time() - start:.0f} s", flush=True)
        if options.out:
            save(options.out, part, measured)


def save(path: Path, part: str, measured: dict[str, Any]) -> None:
    """Replace the entry of a part in the JSON file."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    stored[part] = {"command": f"python -m tests.bench.real_size {part} --out {path}", **measured}
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
