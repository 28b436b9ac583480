"""Write the generated parts of docs/background/smollm2.md from the files in docs/benchmarks/smollm2.

python docs/write_smollm2_table.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from write_drawings_table import DOCS, Run, compare, mean, on_shared_seeds, points, runs, with_parts

PAGE, RESULTS = DOCS / "background" / "smollm2.md", DOCS / "benchmarks" / "smollm2"
NAMES = {
    "base": "base",
    "best of 4": "base, best of 4 responses by the judge",
    "sft": "SFT on the chosen",
    "sft, 64 steps": "SFT on the chosen, twice the steps",
    "dpo": "DPO",
    "dpo, sft term": "DPO with the SFT term",
    "sft, all weights": "SFT on the chosen, all weights",
    "dpo, sft term, all weights": "DPO with the SFT term, all weights",
}
"""Arms in the order of the table, and their names in it."""
UNTRAINED = ("base", "best of 4")
AGAINST = (
    ("dpo, sft term", "sft"),
    ("dpo, sft term", "sft, 64 steps"),
    ("dpo", "sft"),
    ("dpo, sft term", "dpo"),
    ("sft, all weights", "sft"),
    ("dpo, sft term, all weights", "sft, all weights"),
    ("dpo, sft term, all weights", "dpo, sft term"),
)
"""Arms that are compared with each other."""
SHOWN = 2
"""Held-out prompts whose responses are shown: the first of each task."""


def share(own: Sequence[Run], task: str) -> str:
    """Share of right responses to the held-out prompts of one task. Their names begin with it."""
    marks = [
        int(digit)
        for run in own
        for digit, name in zip(run["right"], run["prompts"], strict=True)
        if name.startswith(task)
    ]
    return f"{np.mean(marks):.1%}"


def side_points(first: Sequence[Run], second: Sequence[Run]) -> str:
    return points(compare(first, second, "side_right", prompts="side_prompts", judge="answered"))


def seeds(own: Sequence[Run]) -> str:
    return ", ".join(str(run["seed"]) for run in own)


def arms_table(by_arm: dict[str, list[Run]]) -> str:
    lines = [
        "| | training seeds | right | points over the base | JSON | bullet points | tokens per response | side questions | points over the base | CPU minutes of training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = by_arm["base"]
    for name, own in by_arm.items():
        cells = [NAMES[name], "" if name in UNTRAINED else seeds(own), f"{mean(own, 'right'):.1%}", ""]
        cells += [share(own, "json"), share(own, "list")]
        cells += [
            "" if name == "best of 4" else f"{np.mean([run['tokens'] for run in own]):.0f}",
            f"{mean(own, 'side_right'):.1%}",
            "",
            "",
        ]
        if name != "base":
            cells[3], cells[8] = points(compare(base, own, "right", judge="right")), side_points(base, own)
        seconds = [run["train_cpu_seconds"] for run in own if run["train_cpu_seconds"]]
        cells[9] = f"{np.mean(seconds) / 60:.1f}" if seconds else ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_table(by_arm: dict[str, list[Run]]) -> str:
    lines = ["| | against | seeds | points | points on the side questions |", "|---|---|---|---|---|"]
    for name, other in AGAINST:
        first, second = on_shared_seeds(by_arm.get(other, []), by_arm.get(name, []))
        if first:
            cells = [NAMES[name], NAMES[other], seeds(second), points(compare(first, second, "right", judge="right"))]
            lines.append(f"| {' | '.join([*cells, side_points(first, second)])} |")
    return "\n".join(lines)


def setting(by_arm: dict[str, list[Run]]) -> str:
    """Sentences with the numbers of pairs, steps and prompts, and the time."""
    run = by_arm["sft"][0]
    seconds = sum(run["sample_cpu_seconds"] + (run["train_cpu_seconds"] or 0) for own in by_arm.values() for run in own)
    return (
        f"There were {run['pairs']} pairs. Runs had {run['steps']} steps, {len(run['prompts'])} held-out prompts and "
        f"{len(run['side_prompts'])} side questions. The runs in the table took {seconds / 60:.0f} CPU minutes, without mining."
    )


def examples(by_arm: dict[str, list[Run]]) -> str:
    """Responses of the first run of each arm to the first held-out prompts, with the judge's mark."""
    parts = []
    for number in range(SHOWN):
        parts.append(f"**{by_arm['base'][0]['examples'][number]['prompt']}**")
        for name in (name for name in by_arm if name != "best of 4"):
            example = by_arm[name][0]["examples"][number]
            mark = "right" if example["right"] else "wrong"
            parts.append(f"{NAMES[name]} ({mark}):\n\n{textwrap.indent(example['response'], '    ')}")
    return "\n\n".join(parts)


def written(page: str, by_arm: dict[str, list[Run]]) -> str:
    """Return the page with the parts that these runs give."""
    return with_parts(
        page,
        {
            "setting": setting(by_arm),
            "arms": arms_table(by_arm),
            "against": against_table(by_arm),
            "examples": examples(by_arm),
        },
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), runs(RESULTS, NAMES)), encoding="utf-8")
