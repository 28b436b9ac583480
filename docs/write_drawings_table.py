"""Write the tables of docs/concepts/when-pairs-pay.md from the files in docs/benchmarks/drawings.

python docs/write_drawings_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_mm.evaluation.statistics import Comparison, paired

DOCS = Path(__file__).parent
PAGE, RESULTS = DOCS / "concepts" / "when-pairs-pay.md", DOCS / "benchmarks" / "drawings"
JUDGE = "drawings_faithfulness"
NAMES = {
    "base": "base",
    "best of 8": "base, best of 8 images by the judge",
    "sft": "SFT on the chosen",
    "dpo": "DPO",
    "dpo, sft term": "DPO with the SFT term",
    "sft, then dpo": "SFT, then DPO on its own failures",
    "sft, then dpo, sft term": "SFT, then DPO with the SFT term",
    "sft, then more sft": "SFT, then SFT on its own best",
    "dpo, beta 100": "DPO, beta 100",
    "dpo, rate 2e-3": "DPO, learning rate 2e-3",
    "sft, rate 2e-3": "SFT, learning rate 2e-3",
    "dpo, 280 pairs": "DPO, 280 of the pairs",
    "sft, 280 pairs": "SFT, 280 of the pairs",
    "dpo, 140 pairs": "DPO, 140 of the pairs",
    "sft, 140 pairs": "SFT, 140 of the pairs",
    "dpo, rate 5e-4": "DPO, learning rate 5e-4",
    "sft, rate 5e-4": "SFT, learning rate 5e-4",
    "dpo, beta 2000": "DPO, beta 2000",
    "dpo, K = 4 fixed draws": "DPO, 4 fixed draws per pair",
    "dpo, chosen rendered": "DPO, chosen drawn exactly",
    "sft, chosen rendered": "SFT, chosen drawn exactly",
}
"""Arms in the order of the table, and their names in it. Other arms follow under their own names."""
AGAINST = (
    ("dpo", "sft"),
    ("dpo, sft term", "sft"),
    ("sft, then dpo", "sft, then more sft"),
    ("sft, then dpo, sft term", "sft, then more sft"),
    ("sft, then dpo, sft term", "sft"),
    ("dpo, rate 2e-3", "sft, rate 2e-3"),
    ("dpo, rate 2e-3", "dpo"),
    ("dpo, beta 100", "dpo"),
    ("dpo, 280 pairs", "sft, 280 pairs"),
    ("dpo, 280 pairs", "dpo"),
    ("sft, 280 pairs", "sft"),
    ("dpo, 140 pairs", "sft, 140 pairs"),
    ("dpo, 140 pairs", "dpo"),
    ("sft, 140 pairs", "sft"),
    ("dpo, rate 5e-4", "dpo"),
    ("sft, rate 5e-4", "sft"),
    ("dpo, beta 2000", "dpo"),
    ("dpo, K = 4 fixed draws", "dpo"),
    ("dpo, chosen rendered", "dpo"),
    ("sft, chosen rendered", "sft"),
    ("dpo, chosen rendered", "sft, chosen rendered"),
)
"""Arms that are compared with each other."""

Run = dict[str, Any]


def runs(folder: Path = RESULTS, order: Iterable[str] = NAMES) -> dict[str, list[Run]]:
    """Runs of each arm, by seed. Arms are in this order, others follow."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    names = dict.fromkeys([*order, *(file["arm"] for file in files)])
    by_arm = {name: sorted((f for f in files if f["arm"] == name), key=lambda f: f["seed"]) for name in names}
    return {name: own for name, own in by_arm.items() if own}


def compare(
    first: Sequence[Run], second: Sequence[Run], values: str, *, prompts: str = "prompts", judge: str = JUDGE
) -> Comparison:
    """Compare two arms over the seeds that both have. A run without a seed of its own (the base) pairs with every seed.

    Prompts are the clusters: all runs of an arm saw the same ones.

    Args:
        first, second: runs.
        values: name of a list of values, one or more per prompt, such as "right" of each image.
        prompts: name of the list of their prompts.
        judge: name of the judge of the values.
    """
    by_seed = {run["seed"]: run for run in first}
    pairs = [(by_seed.get(run["seed"], first[0]), run) for run in second if len(first) == 1 or run["seed"] in by_seed]
    numbers = [[float(value) for pair in pairs for value in pair[side][values]] for side in (0, 1)]
    clusters = [
        prompt for _, run in pairs for prompt in run[prompts] for _ in range(len(run[values]) // len(run[prompts]))
    ]
    return paired(*numbers, clusters=clusters, metric=values, judge=judge)


def on_shared_seeds(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs of two arms whose seeds both have."""
    seeds = {run["seed"] for run in first} & {run["seed"] for run in second}
    left, right = ([run for run in own if run["seed"] in seeds] for own in (first, second))
    return left, right


def points(comparison: Comparison) -> str:
    """Difference in percentage points with its interval."""
    text = f"{100 * comparison.difference:+.1f}"
    if comparison.low is None or comparison.high is None:
        return text
    return f"{text} ({100 * comparison.low:+.1f} to {100 * comparison.high:+.1f})"


def mean(own: Sequence[Run], values: str) -> float:
    return float(np.mean([float(value) for run in own for value in run[values]]))


def arms_table(by_arm: dict[str, list[Run]]) -> str:
    lines = [
        "| | seeds | exactly right | points over the base | diversity | change of it, % | CPU minutes of training |",
        "|---|---|---|---|---|---|---|",
    ]
    base = by_arm["base"]
    for name, own in by_arm.items():
        cells = [NAMES.get(name, name), str(len(own)), f"{mean(own, 'right'):.1%}", "", "", "", ""]
        if name == "best of 8":
            cells[3] = f"{100 * (mean(own, 'right') - mean(base, 'right')):+.1f}"
        elif name != "base":
            change = compare(base, own, "diversity")
            cells[3] = points(compare(base, own, "right"))
            cells[5] = f"{100 * change.difference / change.base:+.1f}"
            seconds = [run["train_cpu_seconds"] for run in own if run["train_cpu_seconds"]]
            cells[6] = f"{np.mean(seconds) / 60:.1f}" if seconds else ""
        if own[0]["diversity"]:
            cells[4] = f"{mean(own, 'diversity'):.3f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_table(by_arm: dict[str, list[Run]]) -> str:
    lines = ["| | against | seeds | points |", "|---|---|---|---|"]
    for name, other in AGAINST:
        if name in by_arm and other in by_arm:
            first, second = on_shared_seeds(by_arm[other], by_arm[name])
            result = compare(first, second, "right")
            lines.append(f"| {NAMES[name]} | {NAMES[other]} | {len(second)} | {points(result)} |")
    return "\n".join(lines)


def written(page: str, by_arm: dict[str, list[Run]]) -> str:
    """Return the page with both tables of these runs."""
    return with_parts(page, {"arms": arms_table(by_arm), "against": against_table(by_arm)})


def with_parts(page: str, parts: Mapping[str, str]) -> str:
    """Return the page with each part between its marker and `<!-- end -->`."""
    for name, table in parts.items():
        before, rest = page.split(f"<!-- {name} -->\n")
        page = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), runs()), encoding="utf-8")
