"""Time votes and model ratings at size, in a new file on a local disk.

    python -m tests.bench.votes --out docs/benchmarks/votes.json            # 50,000 pairs, 200,000 votes
    python -m tests.bench.votes --pairs 5000 --votes 20000                  # smaller

Votes are those of the label page: choose and store the next pair, store the vote, and count the progress. Times include the
writes to the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from dpo_mm.labels.ratings import rate_models
from dpo_mm.labels.store import VoteStore

VOTES_TIMED = 200
MODELS = 4


def fill(store: VoteStore, votes: int) -> None:
    """Store votes of people who labelled all pairs, in bulk."""
    with closing(sqlite3.connect(store.path)) as connection, connection:
        connection.execute("INSERT OR IGNORE INTO pairs SELECT pair, '' FROM coverage")
        for number in range(votes // len(store.ids)):
            name = f"person {number}"
            connection.execute("INSERT INTO annotators (name, identity) VALUES (?, ?)", (name, name))
            connection.execute(
                "INSERT INTO presentations (annotator, pair, is_repeat, swapped, shown_at)"
                " SELECT ?, pair, 0, abs(random()) % 2, 0 FROM coverage ORDER BY rank",
                (name,),
            )
        connection.execute(
            "INSERT INTO votes (presentation, choice, cast_at, seconds)"
            " SELECT id, iif(abs(random()) % 2, 'left', 'right'), 0, 1 FROM presentations WHERE vote IS NULL"
        )


def time_votes(store: VoteStore, annotator: str) -> dict[str, float]:
    """Return the median, the 95th percentile and the largest time of a vote, and its mean CPU time, in milliseconds."""
    times, cpu = [], time.process_time()
    for _ in range(VOTES_TIMED):
        start = time.perf_counter()
        shown = store.next_pair(annotator, "browser")
        assert shown is not None and store.cast(annotator, shown.id, "left")
        store.progress(annotator)
        times.append(1000 * (time.perf_counter() - start))
    cpu = 1000 * (time.process_time() - cpu) / VOTES_TIMED
    times.sort()
    return {
        "cpu_ms": cpu,
        "median_ms": statistics.median(times),
        "p95_ms": times[int(0.95 * len(times))],
        "largest_ms": times[-1],
    }


def measure(pairs: int, votes: int, folder: Path) -> dict[str, Any]:
    """Measure opening, voting and rating."""
    ids, draw = [f"pair-{n:06}" for n in range(pairs)], random.Random(0)
    models: dict[str, tuple[str | None, str | None]] = {}
    for pair in ids:
        a, b = draw.sample([f"model {n}" for n in range(MODELS)], 2)
        models[pair] = a, b
    start = time.perf_counter()
    store = VoteStore(folder / "votes.sqlite", ids, source="benchmark", stays_open=True)
    created = time.perf_counter() - start
    empty = time_votes(store, "first")
    fill(store, votes)
    start = time.perf_counter()
    store = VoteStore(store.path, ids, source="benchmark", stays_open=True)
    opened = time.perf_counter() - start
    full = time_votes(store, "last")
    start, cpu = time.perf_counter(), time.process_time()
    rate_models(store.votes(), models)
    rated, rated_cpu = time.perf_counter() - start, time.process_time() - cpu
    rounded = lambda times: {name: round(value, 1) for name, value in times.items()}
    return {
        "pairs": pairs,
        "votes": votes,
        "vote_in_an_empty_file": rounded(empty),
        "vote": rounded(full),
        "ratings_s": round(rated, 2),
        "ratings_cpu_s": round(rated_cpu, 2),
        "create_s": round(created, 2),
        "open_s": round(opened, 2),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
    }


def main() -> None:
    """Measure and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--votes", type=int, default=200_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = json.dumps(measure(arguments.pairs, arguments.votes, Path(folder)), indent=1)
    print(result)
    if arguments.out:
        arguments.out.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
