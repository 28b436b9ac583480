"""Import text rows and image rows in several formats, and measure rows per CPU second.

    python -m tests.bench.import_rows --rows 20000
    python -m tests.bench.import_rows --before ../main --out docs/benchmarks/import-rows.json   # and an earlier checkout

Every import runs in another process, which measures the CPU seconds of the import without the start of Python. With
an earlier checkout the two are measured in turn, and the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bench.import_pickapic import jpegs

QUESTION = "Question number {}: why is the sky blue at noon and red in the evening, and what changes in between?"
CHOSEN = "Sunlight is scattered by air. Short waves scatter more, so the sky is blue. " * 3
REJECTED = "The sky reflects the colour of the sea, which is blue during the day. " * 2
MEASURE = """
import sys, time
from pathlib import Path
import datasets, pyarrow.parquet
from dpo_mm.sources.importing import import_set
start = time.process_time()
result = import_set(sys.argv[1], sys.argv[2], sys.argv[3])
print(result.rows, time.process_time() - start)
"""
FORMATS = {
    "chat JSON lines": ("trl", "chat.jsonl"),
    "chat Parquet": ("trl", "chat.parquet"),
    "ShareGPT JSON lines": ("llama-factory", "turns.jsonl"),
    "plain JSON lines": ("custom-responses", "plain.jsonl"),
    "image pairs, two JPEGs of 128 x 128 in Parquet": ("custom-images", "pairs.parquet"),
}
"""Source and file of each format."""


def chat_row(number: int) -> dict[str, Any]:
    """Row of TRL's conversational format."""
    return {
        "id": f"row-{number}",
        "prompt": [{"role": "user", "content": QUESTION.format(number)}],
        "chosen": [{"role": "assistant", "content": f"{CHOSEN}{number}"}],
        "rejected": [{"role": "assistant", "content": f"{REJECTED}{number}"}],
        "score_gap": 0.5,
    }


def write_files(folder: Path, rows: int) -> None:
    """Write the file of each format with this number of rows."""
    write_lines(folder / "chat.jsonl", (chat_row(number) for number in range(rows)))
    pq.write_table(pa.Table.from_pylist([chat_row(number) for number in range(rows)]), folder / "chat.parquet")
    turn = lambda by, text: {"from": by, "value": text}
    turns = (
        {
            "conversations": [turn("human", QUESTION.format(number))],
            "chosen": turn("gpt", f"{CHOSEN}{number}"),
            "rejected": turn("gpt", f"{REJECTED}{number}"),
        }
        for number in range(rows)
    )
    write_lines(folder / "turns.jsonl", turns)
    texts = lambda number: {"prompt": QUESTION.format(number), "chosen": f"{CHOSEN}{number}", "rejected": REJECTED}
    write_lines(folder / "plain.jsonl", ({**texts(number), "score_gap": 0.5} for number in range(rows)))
    files = jpegs(200, 128)
    columns = {
        "prompt": [f"prompt {number // 3}" for number in range(rows)],
        "image_a": [files[number % 200] + f"{number}a".encode() for number in range(rows)],
        "image_b": [files[number % 199] + f"{number}b".encode() for number in range(rows)],
        "preference": ["ab"[number % 2] for number in range(rows)],
    }
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=1000)


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def rows_per_cpu_second(checkout: Path, source: str, path: Path) -> float:
    """Import a file with the code of a checkout, and return the rows per CPU second."""
    output = Path(tempfile.mkdtemp(dir=path.parent)) / "out"
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, source, str(path), str(output)]
    done = subprocess.run(command, env=environment, cwd=path.parent, check=True, capture_output=True, text=True)
    shutil.rmtree(output.parent)
    rows, seconds = done.stdout.split()[-2:]
    return int(rows) / float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    checkouts = {"after": Path(__file__).parents[2], **({"before": options.before} if options.before else {})}
    report: dict[str, Any] = {
        "command": " ".join(["python -m tests.bench.import_rows", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "rows": options.rows,
        "rounds": options.rounds,
    }
    with tempfile.TemporaryDirectory(prefix="dpo-mm-bench-") as folder:
        write_files(Path(folder), options.rows)
        for name, (source, file) in FORMATS.items():
            measured: dict[str, list[float]] = {side: [] for side in checkouts}
            for _ in range(options.rounds):
                for side, checkout in checkouts.items():
                    measured[side].append(rows_per_cpu_second(checkout, source, Path(folder, file)))
            report[name] = {
                f"rows_per_cpu_second_{side}": round(statistics.median(measured[side])) for side in measured
            }
            if options.before:
                ratios = [after / before for after, before in zip(measured["after"], measured["before"], strict=True)]
                report[name]["ratio"] = round(statistics.median(ratios), 2)
            print(name, report[name], flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
