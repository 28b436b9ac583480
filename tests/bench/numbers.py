"""Write docs/background/experiments.md from the measurements in docs/benchmarks/: python -m tests.bench.numbers"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "background" / "experiments.md"
MEASURED = ("gradient_variance", "sdpo_drift", "shapes_studies", "reference_time", "beta", "kills")


def table(head: str, rows: list[list[str]]) -> str:
    names = head.split(", ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def variance(kept: dict[str, Any]) -> str:
    rows = [
        [row["draws"], f"{row['variance']:.2f} ± {row['standard_error']:.2f}", f"{row['noise_to_signal']:.0f}"]
        for row in kept["rows"]
    ]
    return f"`{kept['command']}`\n\n" + table("sampling, variance of a step's gradient, variance / signal", rows)


def studies(kept: dict[str, Any]) -> str:
    points = lambda found: f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
    rows = [
        [
            one["name"],
            ", ".join(map(str, one["seeds"])),
            f"{one['base']:.1%} → {one['tuned']:.1%}",
            points(one),
            points(one["against_sigmoid"]) if one["against_sigmoid"] else "",
            f"{one['errors/chosen']:.3f}",
            f"{one['errors/rejected']:.3f}",
            f"{one['train_cpu_seconds']:.0f}",
        ]
        for one in kept["variations"]
    ]
    head = (
        "variation, seeds, exactly right, points, points over sigmoid, error of chosen, error of rejected, CPU seconds"
    )
    commands = "\n".join(f"- `{command}`" for command in kept["commands"])
    return f"{commands}\n\n" + table(head, rows)


def drift(kept: dict[str, Any]) -> str:
    places = [10 * n for n in range(1, kept["steps"] // 10 + 1)]
    rows = [
        [row["name"], side.removeprefix("errors/"), *(f"{value:.3f}" for value in row[side])]
        for row in kept["rows"]
        for side in ("errors/chosen", "errors/rejected")
    ]
    return f"`{kept['command']}`\n\n" + table(f"objective, side, {', '.join(f'to step {n}' for n in places)}", rows)


def reference_time(kept: dict[str, Any]) -> str:
    rows = [[row["reference"], f"{row['step_ms']:.0f}", f"{row['before_s']:.1f}"] for row in kept["rows"]]
    head = "reference, CPU ms per step, CPU seconds before the first step"
    return f"`{kept['command']}`\n\n" + table(head, rows)


def betas(kept: dict[str, Any]) -> str:
    rows = [[row["recipe"], f"{row['by_hand']:g}", f"{row['auto']:g}"] for row in kept["rows"]]
    return f"`{kept['command']}`\n\n" + table("recipe, beta found by hand, beta auto", rows)


def kills(kept: dict[str, Any]) -> str:
    rows = [
        [
            str(row["kill"]),
            f"{row['seconds']:.2f}",
            "yes" if row["in a save"] else "no",
            row["newest"] or "none",
            "yes" if row["same bits"] else "NO",
        ]
        for row in kept["kills"]
    ]
    return f"`{kept['command']}`\n\n" + table(
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
    """The page, with a table for each {name} of its text that has been measured."""
    text = (Path(__file__).parent / "numbers.txt").read_text()
    for name in MEASURED:
        file = DOCS / "benchmarks" / f"{name}.json"
        text = text.replace(
            f"{{{name}}}", TABLES[name](json.loads(file.read_text())) if file.exists() else "Not measured yet."
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
