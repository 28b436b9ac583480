"""Variations of the shapes recipe, trained and compared: `safe` against `sigmoid`, K fixed draws against fresh ones.

    python -m tests.bench.shapes_studies OUTPUT.json NAME... [--seeds 0,1,2]

A run that OUTPUT.json has already is not done again. Times are CPU seconds of this process.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_mm.cli import quietly
from dpo_mm.recipe import read_recipe

STUDIES: dict[str, dict[str, str]] = {
    "sigmoid": {},
    "safe, slack 0.9": {"objective": "safe", "settings": "slack:0.9"},
    "safe, slack 0.6": {"objective": "safe", "settings": "slack:0.6"},
    "safe, slack 0.3": {"objective": "safe", "settings": "slack:0.3"},
    "safe, slack 0": {"objective": "safe", "settings": "slack:0"},
    "safe, slack 0.6, beta 2000": {"objective": "safe", "settings": "slack:0.6", "beta": "2000"},
    **{
        f"safe, slack {slack}, rate {rate}": {"objective": "safe", "settings": f"slack:{slack}", "learning_rate": rate}
        for slack in ("0.9", "0.6")
        for rate in ("2e-3", "4e-3")
    },
    **{f"sigmoid, rate {rate}": {"learning_rate": rate} for rate in ("1e-4", "2.5e-4", "5e-4")},
    **{f"K = {k}, kept": {"reference": "precomputed", "reference_draws": str(k)} for k in (1, 4, 16)},
    **{f"K = {k}, asked": {"reference_draws": str(k)} for k in (1, 4, 16)},
}
LAST = 50
"""Steps at the end whose training errors are averaged."""


def run(name: str, seed: int, work: Path) -> dict[str, Any]:
    """One variation: what training showed at its end, and how often its pictures are wholly right.

    work: a folder that all variations share, so that the base's pictures are drawn once a seed.
    """
    from dpo_mm.recipe import compare
    from dpo_mm.trainer import train

    given = {**STUDIES[name], "seed": str(seed), "output_dir": str(work), "log_every": "1"}
    with quietly(), tempfile.TemporaryDirectory() as folder:
        recipe = read_recipe("faithfulness", "shapes", given)
        began = time.process_time()
        trained = train(dataclasses.replace(recipe.train, output_dir=folder))
        spent = time.process_time() - began
        asked = dataclasses.replace(
            recipe.compare, adapter=folder, judges=recipe.compare.judges[:1], scales=(), output_dir=f"{work}/{seed}"
        )
        found = next(one for one in compare(asked, title=name, command="").comparisons if one.headline)
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
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    with tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            for name in names:
                if (name, seed) in {(row["name"], row["seed"]) for row in rows}:
                    continue
                rows.append(run(name, seed, Path(work)))
                tried = " ".join(f'"{one}"' for one in dict.fromkeys(row["name"] for row in rows))
                command = f"python -m tests.bench.shapes_studies docs/benchmarks/shapes_studies.json {tried}"
                out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
