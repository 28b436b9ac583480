"""Train and compare variations of the shapes recipe: `sdpo` against `sigmoid`, K fixed draws, parts of the schedule.

    python -m tests.bench.shapes_studies OUTPUT.json NAME... [--seeds 0,1,2] [--work runs/shapes-studies]

Each row has the base's and the tuned model's fully correct images and the final training errors. Each variation is
compared with the base and with sigmoid on the same seeds, prompt by prompt, over all of its seeds. Runs that OUTPUT.json
already has are not repeated. Times are CPU seconds of this process.
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
    "range 0.3 to 0.9": {"timestep_range": "0.3,0.9"},
    "range 0.3 to 0.9, 150 steps": {"timestep_range": "0.3,0.9", "steps": "150"},
    "range 0.5 to 1, 150 steps": {"timestep_range": "0.5,1.0", "steps": "150"},
    "range 0.5 to 1, 150 steps, beta 2000": {"timestep_range": "0.5,1.0", "steps": "150", "beta": "2000"},
    "range 0.5 to 1, 100 steps": {"timestep_range": "0.5,1.0", "steps": "100"},
}
LAST_STEPS = 50
"""Number of final steps whose training errors are averaged."""


def run(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Train one variation and score its images.

    work: a folder that all variations share, so that the base's images are generated once per seed.

    Returns:
        The final training errors, and for each image of base and tuned model a digit: 1 if it is fully correct.
    """
    from dpo_mm.evaluation.image_sampling import ImageSampler, sampling_plan
    from dpo_mm.evaluation.image_store import ImageStore
    from dpo_mm.policies.families import load_image_policy
    from dpo_mm.training.run import train

    folder = str(work / f"{name}, seed {seed}")
    settings = {**STUDIES[name], "seed": str(seed), "output_dir": str(work), "log_every": "1"}
    with suppress_library_output():
        recipe = read_recipe("faithfulness", "shapes", settings)
        start = time.process_time()
        result = train(dataclasses.replace(recipe.train, output_dir=folder))
        seconds = time.process_time() - start
        compare_config = dataclasses.replace(recipe.compare, adapter=folder, judges=recipe.compare.judges[:1])
        plan = sampling_plan(compare_config)
        sampler = ImageSampler(
            load_image_policy(compare_config.model, precision=compare_config.precision, adapter=folder),
            compare_config,
            ImageStore(work / "pictures"),
            folder,
        )
        scores_by_model = {
            model: sampler.generate(plan, scale=scale, label=model).scores[compare_config.judges[0]]
            for model, scale in (("base", 0.0), ("tuned", 1.0))
        }
    return {
        "name": name,
        "seed": seed,
        "prompts": list(plan.prompts[:: plan.samples]),
        **{
            f"right_{model}": "".join(str(int(image_score)) for image_score in model_scores)
            for model, model_scores in scores_by_model.items()
        },
        **{
            key: _mean_of_last_steps(result.history, key)
            for key in ("errors/chosen", "errors/rejected", "rewards/accuracies", "rewards/margins")
        },
        **{key: value for key, value in result.history[-1].items() if key.startswith("eval_")},
        "train_cpu_seconds": round(seconds, 1),
    }


def _mean_of_last_steps(history: tuple[dict[str, float], ...], key: str) -> float:
    return statistics.mean([entry[key] for entry in history if key in entry][-LAST_STEPS:])


def compare_models(pairs: list[tuple[dict[str, Any], str, str]]) -> dict[str, float]:
    """Compare the fully correct images of two models.

    Args:
        pairs: a row (one per seed) with the digits of the first and of the second model. A seed's prompts are the clusters.
    """
    first_model = [int(digit) for _, first, _ in pairs for digit in first]
    second_model = [int(digit) for _, _, second in pairs for digit in second]
    clusters = [
        f"{row['seed']} {prompt}"
        for row, first, _ in pairs
        for prompt in row["prompts"]
        for _ in range(len(first) // len(row["prompts"]))
    ]
    comparison = paired(first_model, second_model, clusters=clusters, metric="fully correct rate", judge="faithfulness")
    return {
        key: float(getattr(comparison, key)) for key in ("base", "tuned", "difference", "low", "high", "detectable")
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each variation over all of its seeds: with the base, and with sigmoid's tuned model of the same seeds."""
    sigmoid_rows = {row["seed"]: row for row in rows if row["name"] == "sigmoid"}
    summaries = []
    for name in dict.fromkeys(row["name"] for row in rows):
        variation_rows = [row for row in rows if row["name"] == name]
        sigmoid_pairs = [
            (row, sigmoid_rows[row["seed"]]["right_tuned"], row["right_tuned"])
            for row in variation_rows
            if row["seed"] in sigmoid_rows
        ]
        summaries.append(
            {
                "name": name,
                "seeds": [row["seed"] for row in variation_rows],
                **compare_models([(row, row["right_base"], row["right_tuned"]) for row in variation_rows]),
                "against_sigmoid": compare_models(sigmoid_pairs) if sigmoid_pairs and name != "sigmoid" else None,
                **{
                    key: statistics.mean(row[key] for row in variation_rows)
                    for key in ("errors/chosen", "errors/rejected")
                },
                "train_cpu_seconds": statistics.mean(row["train_cpu_seconds"] for row in variation_rows),
            }
        )
    return summaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(STUDIES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes-studies"))
    options = parser.parse_intermixed_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in map(int, options.seeds.split(",")):
        for name in options.names or list(STUDIES):
            if (name, seed) in {(row["name"], row["seed"]) for row in rows}:
                continue
            rows.append(run(name, seed, options.work))
            report = {"commands": commands(rows), "variations": summarise(rows), "rows": rows}
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps(report["variations"], indent=1), flush=True)


def commands(rows: list[dict[str, Any]]) -> list[str]:
    """The commands that measure these rows, one for all variations with the same seeds."""
    seeds: dict[str, list[str]] = {}
    for row in rows:
        seeds.setdefault(row["name"], []).append(str(row["seed"]))
    groups: dict[str, list[str]] = {}
    for name, seed_list in seeds.items():
        groups.setdefault(",".join(sorted(seed_list)), []).append(f'"{name}"')
    start = "python -m tests.bench.shapes_studies docs/benchmarks/shapes_studies.json"
    return [f"{start} {' '.join(names)} --seeds {seed_list}" for seed_list, names in groups.items()]


if __name__ == "__main__":
    main()
