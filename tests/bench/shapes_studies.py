"""Variations of the shapes recipe, trained and compared: `safe` against `sigmoid`, K fixed draws against fresh ones.

    python -m tests.bench.shapes_studies OUTPUT.json NAME... [--seeds 0,1,2]

A run that OUTPUT.json has already is not done again. Times are CPU seconds of this process.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dpo_mm.cli import quietly
from dpo_mm.recipe import read_recipe

STUDIES: dict[str, dict[str, str]] = {
    "sigmoid": {},
    "safe, slack 0.9": {"objective": "safe", "settings": "slack:0.9"},
    "safe, slack 0.6": {"objective": "safe", "settings": "slack:0.6"},
    "safe, slack 0.3": {"objective": "safe", "settings": "slack:0.3"},
    "safe, slack 0": {"objective": "safe", "settings": "slack:0"},
    "safe, slack 0.6, beta 2000": {"objective": "safe", "settings": "slack:0.6", "beta": "2000"},
    **{f"K = {k}, kept": {"reference": "precomputed", "reference_draws": str(k)} for k in (1, 4, 16)},
    **{f"K = {k}, asked": {"reference_draws": str(k)} for k in (1, 4, 16)},
}
LAST = 50
"""Steps at the end whose training errors are averaged."""


def run(name: str, seed: int, folder: Path, bases: dict[str, Any]) -> dict[str, Any]:
    """One variation: what training showed at its end, and how often its pictures are wholly right.

    bases: scores of the base by seed; drawn where they aren't there yet.
    """
    from dpo_mm.evaluation.compare import draw, opened, plan_of
    from dpo_mm.evaluation.statistics import paired
    from dpo_mm.trainer import train

    given = {**STUDIES[name], "seed": str(seed), "output_dir": str(folder), "log_every": "1"}
    with quietly():
        recipe = read_recipe("faithfulness", "shapes", given)
        began = time.process_time()
        trained = train(recipe.train)
        spent = time.process_time() - began
        plan, policy = plan_of(recipe.compare), opened(recipe.compare, str(trained.folder))
        judge = recipe.compare.judges[0]
        if str(seed) not in bases:
            base = draw(policy, plan, recipe.compare, scale=0.0, title="drawing with the base")
            bases[str(seed)] = [float(score) for score in base.scores[judge]]
        tuned = draw(policy, plan, recipe.compare, scale=1.0, title="drawing with the tuned")
    scores = np.array(bases[str(seed)]), np.array(tuned.scores[judge], dtype=float)
    found = paired(*scores, clusters=np.array(plan.prompts), metric=name, judge=judge, seed=seed)
    return {
        "name": name,
        "seed": seed,
        **{key: getattr(found, key) for key in ("base", "tuned", "difference", "low", "high")},
        **{key: _end(trained.history, key) for key in ("error_chosen", "error_rejected", "accuracy", "margin")},
        **{key: value for key, value in trained.history[-1].items() if key.startswith("eval_")},
        "train_cpu_seconds": round(spent, 1),
    }


def _end(history: tuple[dict[str, float], ...], key: str) -> float:
    return statistics.mean([entry[key] for entry in history if key in entry][-LAST:])


def main(arguments: list[str]) -> None:
    seeds = [0]
    if "--seeds" in arguments:
        place = arguments.index("--seeds")
        seeds = [int(part) for part in arguments[place + 1].split(",")]
        del arguments[place : place + 2]
    out, names = Path(arguments[0]), arguments[1:] or list(STUDIES)
    kept = json.loads(out.read_text()) if out.exists() else {"rows": [], "bases": {}}
    for seed in seeds:
        for name in names:
            if (name, seed) in {(row["name"], row["seed"]) for row in kept["rows"]}:
                continue
            with tempfile.TemporaryDirectory() as folder:
                kept["rows"].append(run(name, seed, Path(folder), kept["bases"]))
            command = "python -m tests.bench.shapes_studies OUTPUT.json NAME... --seeds SEEDS"
            out.write_text(json.dumps({"command": command, **kept}, indent=1) + "\n")
            print(json.dumps(kept["rows"][-1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
