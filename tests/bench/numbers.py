"""Write docs/background/experiments.md from the measurements in docs/benchmarks/.

Command: python -m tests.bench.numbers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "background" / "experiments.md"
MEASURED = ("gradient_variance", "sdpo_drift", "shapes_studies", "reference_time", "beta", "kills")


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table. head: column names, separated by commas."""
    names = head.split(", ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def variance(measured: dict[str, Any]) -> str:
    rows = [
        [row["draws"], f"{row['variance']:.2f} ± {row['standard_error']:.2f}", f"{row['noise_to_signal']:.0f}"]
        for row in measured["rows"]
    ]
    return f"`{measured['command']}`\n\n" + table("sampling, variance of a step's gradient, variance / signal", rows)


def studies(measured: dict[str, Any]) -> str:
    points = lambda result: (
        f"{100 * result['difference']:+.1f} ({100 * result['low']:+.1f} to {100 * result['high']:+.1f})"
    )
    rows = [
        [
            variation["name"],
            ", ".join(map(str, variation["seeds"])),
            f"{variation['base']:.1%} → {variation['tuned']:.1%}",
            points(variation),
            points(variation["against_sigmoid"]) if variation["against_sigmoid"] else "",
            f"{variation['errors/chosen']:.3f}",
            f"{variation['errors/rejected']:.3f}",
            f"{variation['train_cpu_seconds']:.0f}",
        ]
        for variation in measured["variations"]
    ]
    head = (
        "variation, seeds, exactly right, points, points over sigmoid, error of chosen, error of rejected, CPU seconds"
    )
    commands = "\n".join(f"- `{command}`" for command in measured["commands"])
    return f"{commands}\n\n" + table(head, rows)


def drift(measured: dict[str, Any]) -> str:
    steps = [10 * n for n in range(1, measured["steps"] // 10 + 1)]
    rows = [
        [row["name"], side.removeprefix("errors/"), *(f"{value:.3f}" for value in row[side])]
        for row in measured["rows"]
        for side in ("errors/chosen", "errors/rejected")
    ]
    return f"`{measured['command']}`\n\n" + table(f"objective, side, {', '.join(f'to step {n}' for n in steps)}", rows)


def reference_time(measured: dict[str, Any]) -> str:
    rows = [[row["reference"], f"{row['step_ms']:.0f}", f"{row['before_s']:.1f}"] for row in measured["rows"]]
    head = "reference, CPU ms per step, CPU seconds before the first step"
    return f"`{measured['command']}`\n\n" + table(head, rows)


def betas(measured: dict[str, Any]) -> str:
    rows = [[row["recipe"], f"{row['by_hand']:g}", f"{row['auto']:g}"] for row in measured["rows"]]
    return f"`{measured['command']}`\n\n" + table("recipe, beta found by hand, beta auto", rows)


def kills(measured: dict[str, Any]) -> str:
    rows = [
        [
            str(row["kill"]),
            f"{row['seconds']:.2f}",
            "yes" if row["in a save"] else "no",
            row["newest"] or "none",
            "yes" if row["same bits"] else "NO",
        ]
        for row in measured["kills"]
    ]
    return f"`{measured['command']}`\n\n" + table(
        "kill, seconds in, in a save, newest complete checkpoint, bit-identical", rows
    )


TABLES = {
    "gradient_variance": variance,
    "sdpo_drift": drift,
    "shapes_studies": studies,
    "reference_time": reference_time,
    "beta": betas,
    "kills": kills,
}


def page() -> str:
    """Return the page. A table replaces each {name} in its text if the measurement exists."""
    text = (Path(__file__).parent / "numbers.txt").read_text()
    for name in MEASURED:
        file = DOCS / "benchmarks" / f"{name}.json"
        text = text.replace(
            f"{{{name}}}", TABLES[name](json.loads(file.read_text())) if file.exists() else "Not measured yet."
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
