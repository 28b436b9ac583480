"""Measure whether round two adds to round one on the bundled tasks, and what it costs.

    python -m tests.bench.rounds OUT [--tasks 'captioner,short captioner,images'] [--seeds 0,1,2] [--work FOLDER]

OUT is a JSON file, for example docs/benchmarks/rounds.json, with the rounds and the last comparison of each task and seed. A run
that is in OUT is not repeated, and an interrupted one continues from --work. Seconds are of this machine, with one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_mm import rounds
from dpo_mm.cli.terminal import suppress_library_output
from dpo_mm.config import CompareConfig, MineConfig, TrainConfig
from dpo_mm.files.resumable import atomic_write
from dpo_mm.recipe import Recipe, read_recipe, run_recipe

ROUNDS = 3
SEED_DISTANCE = 100_000
"""Distance of the seeds of two runs, so that no round of one has the images of a round of the other."""


def captioner(folder: str, seed: int) -> Recipe:
    """The recipe captioner-shapes, three rounds at most."""
    return read_recipe("captioner", "shapes", {"output_dir": folder, "seed": str(seed), "rounds": str(ROUNDS)})


def short_captioner(folder: str, seed: int) -> Recipe:
    """The recipe captioner-shapes with a third of its steps in each of three rounds."""
    steps = {"steps": "33", "output_dir": folder, "seed": str(seed), "rounds": str(ROUNDS)}
    return read_recipe("captioner", "shapes", steps)


def images(folder: str, seed: int) -> Recipe:
    """The recipe faithfulness-shapes, with pairs from the model's own images instead of the bundled ones."""
    plain = read_recipe("faithfulness", "quickstart", {"output_dir": folder, "seed": str(seed)})
    assert isinstance(plain.compare, CompareConfig) and isinstance(plain.train, TrainConfig)
    sampling = {
        "num_inference_steps": plain.compare.num_inference_steps,
        "guidance_scale": plain.compare.guidance_scale,
        "batch_size": plain.compare.batch_size,
    }
    mining = MineConfig(
        "shapes-sd",
        "shapes-train",
        f"{folder}/mined",
        "faithfulness",
        images_per_prompt=4,
        max_prompts=300,
        seed=seed,
        **sampling,  # type: ignore[arg-type]
    )
    return Recipe(plain.title, plain.train, plain.compare, mine=mining, rounds=ROUNDS)


TASKS: dict[str, Callable[[str, int], Recipe]] = {
    "captioner": captioner,
    "short captioner": short_captioner,
    "images": images,
}


def timed(step: Callable[..., Any], name: str, folder: Path) -> Callable[..., Any]:
    """Return the step with its wall seconds added to those in the run's file."""

    def run(config: Any, **options: Any) -> Any:
        file = folder / "seconds.json"
        start = time.monotonic()
        try:
            return step(config, **options)
        finally:
            seconds = read(file)
            place = Path(config.output_dir).name
            seconds[place] = seconds.get(place, 0.0) + time.monotonic() - start
            write(file, seconds)

    return run


def measure(task: str, seed: int, work: Path) -> dict[str, Any]:
    """Run the rounds of one task and seed and return their numbers."""
    folder = work / f"{task}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    originals = {name: getattr(rounds, name) for name in ("mine", "train", "compare")}
    try:
        for name, step in originals.items():
            setattr(rounds, name, timed(step, name, folder))
        with suppress_library_output():
            run_recipe(TASKS[task](str(folder / "run"), seed * SEED_DISTANCE), command="tests.bench.rounds")
    finally:
        for name, step in originals.items():
            setattr(rounds, name, step)
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    last = [row for row in metrics["comparisons"] if row["direction"] != "neutral"]
    return {
        "best_round": metrics["best_round"],
        "rounds": [summary(point) for point in metrics["rounds"]],
        "last_comparison": {row["metric"]: numbers(row) for row in last},
        "last_verdict": metrics["verdict"],
        "end": metrics["notes"][0],
        "seconds": {name: round(value, 1) for name, value in read(folder / "seconds.json").items()},
    }


def summary(point: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of one round."""
    names = ("number", "passed", "level", "pairs", "log_probs", "diversity", "tokens", "decision")
    return {**{name: point[name] for name in names}, "primary": numbers(point["headline"])}


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of one comparison."""
    return {name: row[name] for name in ("base", "tuned", "difference", "low", "high", "p", "p_holm", "verdict", "n")}


def read(path: Path) -> dict[str, Any]:
    """Content of a JSON file, empty if there is none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-rounds"))
    options = parser.parse_args()
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            results = read(options.out)
            if f"{seed}" not in results.setdefault(task, {}):
                results[task][f"{seed}"] = measure(task, seed, options.work)
                write(options.out, results)
                print(f"{task}, seed {seed}: {results[task][f'{seed}']['end']}")


if __name__ == "__main__":
    main()
