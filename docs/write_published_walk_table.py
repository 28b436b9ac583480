"""Write the generated parts of docs/concepts/sft-or-dpo.md from the files in docs/benchmarks/published-walk.

python docs/write_published_walk_table.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from write_drawings_table import DOCS, Run, on_shared_seeds, points, runs, with_parts

from dpo_mm.evaluation.statistics import Comparison, holm_corrected, paired_ratios
from dpo_mm.judges import better_of

PAGE, RESULTS = DOCS / "concepts" / "sft-or-dpo.md", DOCS / "benchmarks" / "published-walk"
TUNINGS = {"lora": "LoRA", "full": "all weights"}
NAMES = {
    "base": "base, trained on looping transcriptions",
    "sft": "SFT",
    "dpo, 16 per step": "SFT, then DPO with the SFT term, 16 pairs per step",
    "more sft, 16 per step": "SFT, then more SFT, 16 rows per step",
    "sft on the failures, 16 per step": "SFT, then SFT on the failed pages, 16 rows per step",
    "dpo without the sft term, 16 per step": "SFT, then DPO without the SFT term, 16 pairs per step",
    "dpo, 8 per step": "SFT, then DPO with the SFT term, 8 pairs per step",
    "more sft, 8 per step": "SFT, then more SFT, 8 rows per step",
    "sft on the failures, 8 per step": "SFT, then SFT on the failed pages, 8 rows per step",
}
"""Arms in the order of the table, and their names in it."""
AGAINST = (
    ("sft", "base"),
    ("more sft, 16 per step", "sft"),
    ("sft on the failures, 16 per step", "sft"),
    ("more sft, 8 per step", "sft"),
    ("sft on the failures, 8 per step", "sft"),
    ("dpo, 16 per step", "sft"),
    ("dpo, 16 per step", "more sft, 16 per step"),
    ("dpo, 16 per step", "sft on the failures, 16 per step"),
    ("dpo, 8 per step", "sft"),
    ("dpo, 8 per step", "more sft, 8 per step"),
    ("dpo, 8 per step", "sft on the failures, 8 per step"),
    ("dpo, 16 per step", "dpo, 8 per step"),
    ("dpo without the sft term, 16 per step", "dpo, 16 per step"),
)
"""Arms that are compared with each other."""
SHOWN = ("levenshtein_bleu", "cer", "valid_json")
"""Judges in the tables next to degeneration."""

Arms = dict[str, list[Run]]


def counts(own: Sequence[Run], judge: str) -> NDArray[np.float64]:
    """Hits and totals of each page, summed over the training seeds, (pages, 2)."""
    columns = [(run[judge]["hits"], run[judge].get("totals") or [1] * len(run[judge]["hits"])) for run in own]
    return np.sum(columns, axis=0, dtype=np.float64).T


def rate(own: Sequence[Run], judge: str) -> float:
    hits, totals = counts(own, judge).sum(0)
    return float(hits / totals)


def compare(first: Sequence[Run], second: Sequence[Run], judge: str) -> Comparison:
    """Compare two arms over the seeds that both have, page by page. The base pairs with every seed."""
    left, right = (
        (list(first) * len(second), list(second)) if first[0]["arm"] == "base" else on_shared_seeds(first, second)
    )
    return paired_ratios(
        counts(left, judge), counts(right, judge), metric=judge, judge=judge, direction=better_of(judge)
    )


def seeds(own: Sequence[Run]) -> str:
    return ", ".join(str(run["seed"]) for run in own)


def arms_table(by_tuning: dict[str, Arms]) -> str:
    times = json.loads((RESULTS / "times.json").read_text(encoding="utf-8"))["milliseconds"]
    lines = [
        "| | trained | seeds | degenerate pages | of each seed | quality | character error rate | valid JSON | tokens per page | CPU ms per page | CPU minutes of training |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tuning, by_arm in by_tuning.items():
        for name, own in by_arm.items():
            is_base = name == "base"
            if is_base and tuning != next(iter(by_tuning)):
                continue
            each = "" if is_base else ", ".join(f"{rate([run], 'degeneration'):.1%}" for run in own)
            cells = [NAMES[name], "" if is_base else TUNINGS[tuning], "" if is_base else seeds(own)]
            cells += [f"{rate(own, 'degeneration'):.1%}", each, *(f"{rate(own, judge):.1%}" for judge in SHOWN)]
            seconds = [run["train_cpu_seconds"] for run in own if run["train_cpu_seconds"]]
            cells += [f"{rate(own, 'num_tokens'):.1f}", f"{np.median(times[tuning][name]):.0f}"]
            cells += [f"{np.mean(seconds) / 60:.1f}" if seconds else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_table(by_tuning: dict[str, Arms]) -> str:
    lines = [
        "| | against | trained | seeds | degenerate pages, points | p | quality, points | character error rate, points | valid JSON, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tuning, by_arm in by_tuning.items():
        rows = [(by_arm[other], by_arm[name]) for name, other in AGAINST if name in by_arm and other in by_arm]
        loops = holm_corrected([compare(first, second, "degeneration") for first, second in rows])
        for (first, second), loop in zip(rows, loops, strict=True):
            shared = second if first[0]["arm"] == "base" else on_shared_seeds(first, second)[1]
            cells = [NAMES[second[0]["arm"]], NAMES[first[0]["arm"]], TUNINGS[tuning], seeds(shared), points(loop)]
            cells += [f"{loop.p_holm:.2g}", *(points(compare(first, second, judge)) for judge in SHOWN)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs_line(by_tuning: dict[str, Arms]) -> str:
    """Numbers of mined pairs."""
    parts = []
    for tuning, by_arm in by_tuning.items():
        own = by_arm["dpo, 16 per step"]
        numbers = ", ".join(str(run["rows"]) for run in own)
        parts.append(f"{numbers} ({TUNINGS[tuning]}, seed{'s' if len(own) > 1 else ''} {seeds(own)})")
    return f"Pairs with a degenerate one of two responses to each training page, after SFT: {' and '.join(parts)}."


def measured() -> dict[str, Arms]:
    """Runs of each tuning by arm. All have the one base."""
    by_tuning = {tuning: runs(RESULTS / tuning, NAMES) for tuning in TUNINGS}
    base = {"base": by_tuning["lora"]["base"]}
    return {tuning: base | by_arm for tuning, by_arm in by_tuning.items() if by_arm}


def written(page: str, by_tuning: dict[str, Arms]) -> str:
    """Return the page with the parts that these runs give."""
    parts = {"pairs": pairs_line, "arms": arms_table, "against": against_table}
    return with_parts(page, {name: part(by_tuning) for name, part in parts.items()})


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), measured()), encoding="utf-8")
