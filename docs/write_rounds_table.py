"""Write the generated part of docs/how-to/rounds.md from docs/benchmarks/rounds.json.

python docs/write_rounds_table.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from write_drawings_table import DOCS, with_parts

PAGE, RESULTS = DOCS / "how-to" / "rounds.md", DOCS / "benchmarks" / "rounds.json"
TASKS = {"captioner": "captioner, 100 steps", "short captioner": "captioner, 33 steps", "images": "images, 300 steps"}
"""Tasks in the order of the table, and their names in it."""


def change(row: Mapping[str, Any]) -> str:
    """The two values of a comparison."""
    return f"{row['base']:.1%} → {row['tuned']:.1%}"


def minutes(seconds: Mapping[str, float], number: int) -> float:
    """Minutes of one round: mining, training and comparing."""
    return sum(seconds.get(f"{step}-{number}", 0.0) for step in ("mined", "adapter", "compared")) / 60


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    most = max(len(run["rounds"]) for runs in results.values() for run in runs.values())
    names = [f"round {number}" for number in range(1, most + 1)]
    head = [
        "task, steps per round",
        "seed",
        *names,
        "round to use",
        "last comparison",
        "pairs by round",
        "minutes by round",
    ]
    lines = [head, ["---"] * len(head)]
    for task, name in TASKS.items():
        for seed, run in results.get(task, {}).items():
            rounds = [f"{change(one['primary'])}, {one['primary']['verdict']}" for one in run["rounds"]]
            last = next(iter(run["last_comparison"].values()))
            pairs = ", ".join(str(one["pairs"]) for one in run["rounds"])
            time = ", ".join(f"{minutes(run['seconds'], one['number']):.1f}" for one in run["rounds"])
            cells = [*rounds, *[""] * (most - len(rounds)), str(run["best_round"]), change(last), pairs, time]
            lines.append([name, seed, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page with the table of these results."""
    return with_parts(page, {"rounds": table(results)})


if __name__ == "__main__":
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
