"""Variations of the shapes recipe, trained and compared: `sdpo` against `sigmoid`, K fixed draws against fresh ones.

    python -m tests.bench.shapes_studies OUTPUT.json NAME... [--seeds 0,1,2] [--work runs/shapes-studies]

Each row: the pictures of base and tuned that are wholly right, the training errors of the end, and the same seed's sigmoid
beside it, prompt by prompt; and for variations of several seeds, all of them together. A run that OUTPUT.json has already
is not done again. Times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.evaluation.statistics import paired
from dpo_mm.recipe import read_recipe

STUDIES: dict[str, dict[str, str]] = {
    "sigmoid": {},
    "sdpo, slack 0.9": {"objective": "sdpo", "objective_kwargs": "slack:0.9"},
    "sdpo, slack 0.6": {"objective": "sdpo", "objective_kwargs": "slack:0.6"},
    "sdpo, slack 0.3": {"objective": "sdpo", "objective_kwargs": "slack:0.3"},
    "sdpo, slack 0": {"objective": "sdpo", "objective_kwargs": "slack:0"},
    "sdpo, slack 0.6, beta 2000": {"objective": "sdpo", "objective_kwargs": "slack:0.6", "beta": "2000"},
    **{f"K = {k}, kept": {"reference": "precomputed", "fixed_draws_per_row": str(k)} for k in (1, 4, 16)},
    **{f"K = {k}, asked": {"fixed_draws_per_row": str(k)} for k in (1, 4, 16)},
}
LAST = 50
"""Steps at the end whose training errors are averaged."""


def run(name: str, seed: int, work: Path) -> dict[str, Any]:
    """One variation: what training showed at its end, and which of its pictures are wholly right.

    work: a folder that all variations share, so that the base's pictures are drawn once a seed.
    """
    from dpo_mm.evaluation.image_sampling import ImageSampler, sampling_plan
    from dpo_mm.evaluation.image_store import ImageStore
    from dpo_mm.policies.families import load_image_policy
    from dpo_mm.training.run import train

    folder = str(work / f"{name}, seed {seed}")
    given = {**STUDIES[name], "seed": str(seed), "output_dir": str(work), "log_every": "1"}
    with suppress_library_output():
        recipe = read_recipe("faithfulness", "shapes", given)
        began = time.process_time()
        trained = train(dataclasses.replace(recipe.train, output_dir=folder))
        spent = time.process_time() - began
        asked = dataclasses.replace(recipe.compare, adapter=folder, judges=recipe.compare.judges[:1])
        plan = sampling_plan(asked)
        studio = ImageSampler(
            load_image_policy(asked.model, precision=asked.precision, adapter=folder),
            asked,
            ImageStore(work / "pictures"),
            folder,
        )
        right = {
            side: studio.draw(plan, scale=scale, label=side).scores[asked.judges[0]]
            for side, scale in (("base", 0.0), ("tuned", 1.0))
        }
    return {
        "name": name,
        "seed": seed,
        "prompts": list(plan.prompts[:: plan.samples]),
        **{f"right_{side}": "".join(str(int(score)) for score in scores) for side, scores in right.items()},
        **{
            key: _end(trained.history, key)
            for key in ("errors/chosen", "errors/rejected", "rewards/accuracies", "rewards/margins")
        },
        **{key: value for key, value in trained.history[-1].items() if key.startswith("eval_")},
        "train_cpu_seconds": round(spent, 1),
    }


def _end(history: tuple[dict[str, float], ...], key: str) -> float:
    return statistics.mean([entry[key] for entry in history if key in entry][-LAST:])


def compared(pairs: list[tuple[dict[str, Any], str, str]]) -> dict[str, float]:
    """What is right of two models, over rows of each their own seed; a seed's prompts are the clusters."""
    one = [int(digit) for _, first, _ in pairs for digit in first]
    other = [int(digit) for _, _, second in pairs for digit in second]
    clusters = [
        f"{row['seed']} {prompt}"
        for row, first, _ in pairs
        for prompt in row["prompts"]
        for _ in range(len(first) // len(row["prompts"]))
    ]
    found = paired(one, other, clusters=clusters, metric="fully correct rate", judge="faithfulness")
    return {key: float(getattr(found, key)) for key in ("base", "tuned", "difference", "low", "high", "detectable")}


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variation over all of its seeds: tuned against base, and against sigmoid's tuned of the same seeds."""
    plain = {row["seed"]: row for row in rows if row["name"] == "sigmoid"}
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        beside = [(row, plain[row["seed"]]["right_tuned"], row["right_tuned"]) for row in own if row["seed"] in plain]
        found.append(
            {
                "name": name,
                "seeds": [row["seed"] for row in own],
                **compared([(row, row["right_base"], row["right_tuned"]) for row in own]),
                "against_sigmoid": compared(beside) if beside and name != "sigmoid" else None,
                **{key: statistics.mean(row[key] for row in own) for key in ("errors/chosen", "errors/rejected")},
                "train_cpu_seconds": statistics.mean(row["train_cpu_seconds"] for row in own),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(STUDIES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes-studies"))
    given = parser.parse_intermixed_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for seed in map(int, given.seeds.split(",")):
        for name in given.names or list(STUDIES):
            if (name, seed) in {(row["name"], row["seed"]) for row in rows}:
                continue
            rows.append(run(name, seed, given.work))
            kept = {"commands": commands(rows), "variations": summed(rows), "rows": rows}
            given.out.write_text(json.dumps(kept, indent=1) + "\n")
            print(json.dumps(kept["variations"], indent=1), flush=True)


def commands(rows: list[dict[str, Any]]) -> list[str]:
    """What measures these rows, a command for the variations of the same seeds."""
    seeds: dict[str, list[str]] = {}
    for row in rows:
        seeds.setdefault(row["name"], []).append(str(row["seed"]))
    groups: dict[str, list[str]] = {}
    for name, of in seeds.items():
        groups.setdefault(",".join(sorted(of)), []).append(f'"{name}"')
    start = "python -m tests.bench.shapes_studies docs/benchmarks/shapes_studies.json"
    return [f"{start} {' '.join(names)} --seeds {of}" for of, names in groups.items()]


if __name__ == "__main__":
    main()
