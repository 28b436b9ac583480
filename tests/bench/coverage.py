"""Measure how often the 95 % interval of a comparison contains the true difference.

    python -m tests.bench.coverage            # about two minutes on one CPU core

Base and tuned model are right at a rate of 2, 10 or 50 %, on 6 to 400 prompts with one or four images each. Prompts may
differ in difficulty. Rates are equal, or the tuned model's is another. The same counts go through `paired` and, with one
image per prompt, `paired_ratios`. A comparison of fewer than five differing images has no interval and is counted apart.

A case that prints an interval in fewer than 1 in 20 comparisons has no coverage here: there the event that prints it is
rare, and 4,000 comparisons have too few of them. Writes coverage.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from dpo_mm.evaluation.statistics import paired, paired_ratios

TARGET = Path(__file__).parents[2] / "docs" / "benchmarks" / "coverage.json"
GROUPS, RATES, SAMPLES, SPREADS = (6, 12, 24, 72, 400), (0.02, 0.1, 0.5), (1, 4), (0.0, 1.5)
"""Number of prompts, rates, images per prompt, and standard deviation of a prompt's difficulty in log-odds."""
OTHER_RATE = {0.02: 0.1, 0.1: 0.02, 0.5: 0.3}
"""Rate of the tuned model in the cases with a difference, by the base's rate."""
MIN_PRINTED = 0.05


def probabilities(rate: float, difficulty: np.ndarray) -> np.ndarray:
    """Probability of a right image on prompts of this difficulty."""
    return 1 / (1 + np.exp(-(np.log(rate / (1 - rate)) + difficulty)))


def coverage(
    groups: int, base: float, tuned: float, *, samples: int, spread: float, runs: int, ratios: bool = False
) -> dict[str, Any]:
    """Simulate comparisons of one case.

    Args:
        groups: number of prompts.
        base, tuned: rates of the models at difficulty 0.
        samples: images per prompt.
        spread: standard deviation of the difficulty.
        runs: number of comparisons.
        ratios: whether to use `paired_ratios` instead of `paired`.

    Returns:
        The case, the fraction of comparisons with an interval, and the fraction of those that contain the true difference.
    """
    rng = np.random.default_rng([groups, samples, *(round(1000 * value) for value in (base, tuned, spread))])
    many = rng.normal(0, spread, 400_000)
    truth = float(probabilities(tuned, many).mean() - probabilities(base, many).mean())
    events = float(probabilities(base, many).mean() * groups * samples)
    clusters, printed, covered = np.arange(groups).repeat(samples), 0, 0
    for _ in range(runs):
        difficulty = rng.normal(0, spread, groups).repeat(samples)
        right = [(rng.random(groups * samples) < probabilities(rate, difficulty)) * 1.0 for rate in (base, tuned)]
        if ratios:
            counts = [np.column_stack([each, np.ones_like(each)]) for each in right]
            result = paired_ratios(*counts, metric="rate", judge="simulated")
        else:
            result = paired(*right, clusters=clusters, metric="rate", judge="simulated")
        if result.low is not None and result.high is not None:
            printed += 1
            covered += result.low <= truth <= result.high
    return {
        "function": "paired_ratios" if ratios else "paired",
        "groups": groups,
        "samples": samples,
        "spread": spread,
        "base": base,
        "tuned": tuned,
        "expected events": round(events, 1),
        "printed": printed / runs,
        "coverage": round(covered / printed, 4) if printed >= MIN_PRINTED * runs else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000, help="comparisons per case")
    options = parser.parse_args()
    start, rows = time.process_time(), []
    for groups, rate, samples, spread in itertools.product(GROUPS, RATES, SAMPLES, SPREADS):
        for tuned, ratios in itertools.product((rate, OTHER_RATE[rate]), (False, True)):
            if samples == 1 or not ratios:
                case = coverage(groups, rate, tuned, samples=samples, spread=spread, runs=options.runs, ratios=ratios)
                rows.append(case)
                print(json.dumps(case), flush=True)
    known = [row for row in rows if row["coverage"] is not None]
    enough = [row["coverage"] for row in known if row["expected events"] >= 5]
    report = {
        "command": f"python -m tests.bench.coverage --runs {options.runs}",
        "lowest coverage": min(row["coverage"] for row in known),
        "highest coverage with five expected events": max(enough),
        "cpu_seconds": round(time.process_time() - start),
        "rows": rows,
    }
    TARGET.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
