"""Simulate how often rounds go further although nothing improved, and how often they notice an improvement.

    python -m tests.bench.round_alarms docs/benchmarks/round-alarms.json

Each prompt has its own difficulty and four seeds. Base and tuned are right with the same probability, or with one that is higher by
the gain. Three judges, of which two are guards, are compared and corrected as `compare` does, and `dpo_mm.rounds.decide` decides.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_mm.evaluation.significance import rate_interval
from dpo_mm.evaluation.statistics import Comparison, holm_corrected, paired
from dpo_mm.evaluation.verdict import CompareResult, run_verdict
from dpo_mm.rounds import decide

SEEDS = 4
JUDGES = ("primary", "first guard", "second guard")


def simulated_round(rng: np.random.Generator, gain: float, prompts: int) -> CompareResult:
    """Compare a round with the one before it. gain: shift of the primary metric's logit."""
    clusters = np.arange(prompts).repeat(SEEDS)
    rows: list[Comparison] = []
    for judge in JUDGES:
        logit = rng.normal(0, 1.5, prompts).repeat(SEEDS)
        shift = gain if judge == "primary" else 0.0
        base, tuned = (rng.random(len(logit)) < 1 / (1 + np.exp(-(logit + each))) for each in (0.0, shift))
        rows.append(paired(base, tuned, clusters=clusters, metric=judge, judge=judge, headline=judge == "primary"))
    rows = holm_corrected(rows)
    return CompareResult(run_verdict(rows[0], rows[1:]), tuple(rows), (), Path())


def rounds_passed(gains: Sequence[float], *, simulations: int, prompts: int, seed: int = 0) -> Counter[int]:
    """Count after how many passed rounds the simulated rounds stop.

    Args:
        gains: gain of each round, as many as there may be rounds.
        simulations: number of simulated recipes.
        prompts: number of held-out prompts in each comparison.
        seed: of the random numbers.
    """
    passed: Counter[int] = Counter()
    for number in range(simulations):
        rng = np.random.default_rng((seed, number))
        count = 0
        while count < len(gains) and decide(simulated_round(rng, gains[count], prompts), rounds=len(gains)).passes:
            count += 1
        passed[count] += 1
    return passed


CASES: dict[str, tuple[float, ...]] = {
    "never better, 2 rounds": (0.0,) * 2,
    "never better, 3 rounds": (0.0,) * 3,
    "never better, 5 rounds": (0.0,) * 5,
    "better in round 1 only": (1.5, 0.0, 0.0),
    "better in rounds 1 and 2": (1.5, 1.0, 0.0),
    "always worse": (-0.5,) * 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--simulations", type=int, default=1000)
    options = parser.parse_args()
    results = {}
    for name, gains in CASES.items():
        passed = rounds_passed(gains, simulations=options.simulations, prompts=72)
        first = passed[0]
        results[name] = {
            "simulations": options.simulations,
            "prompts": 72,
            "gains": gains,
            "stopped after passed rounds": {str(count): passed[count] for count in range(len(gains) + 1)},
            "stopped at round 1": first / options.simulations,
            "exact interval": rate_interval(first, options.simulations),
        }
        print(name, results[name]["stopped after passed rounds"])
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
