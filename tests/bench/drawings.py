"""Find out when preference pairs pay on the bundled drawings: DPO, SFT, both, in stages, against best-of-8 sampling.

    python -m tests.bench.drawings docs/benchmarks/drawings [ARM ...] [--seeds 0,1,2] [--work runs/drawings] [--list]

Each arm and seed is one JSON file in the folder, about 5 CPU minutes. Arms whose file exists are not run again, so an
interrupted study resumes. All arms are evaluated on the same held-out prompts and seeds of images. The seed of an arm is that
of its training. Best-of-8 uses the judge that also scores it, so it is the upper bound of choosing among eight images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dpo_mm.assets import resolve_asset
from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import CompareConfig, MineConfig, TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import write_rows
from dpo_mm.data.schema import image_preference, make_image_rows
from dpo_mm.evaluation.compare_images import diversity
from dpo_mm.evaluation.image_sampling import ImageSampler, ScoredImages, sampling_plan
from dpo_mm.evaluation.image_store import ImageStore
from dpo_mm.mining.mine_images import mine_images
from dpo_mm.policies.families import load_image_policy
from dpo_mm.recipe import read_recipe
from dpo_mm.training.objective_settings import sft_baseline_config
from dpo_mm.training.run import train
from dpo_mm.worlds import drawing_prompts, drawings

JUDGE = "drawings_faithfulness"
PROMPTS, IMAGES, BEST_OF = 150, 2, 8
"""Held-out prompts, images per prompt, and images per prompt of best-of-8 sampling."""
STEPS, SECOND_STEPS = 100, 100
"""Steps of 16 pairs of every arm, and of a second stage."""
OWN_PROMPTS, OWN_IMAGES = 200, 4
"""Training prompts and images of each for the pairs of the second stage."""
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dpo": {},
    "dpo, sft term": {"sft_weight": 250.0},
    "dpo, 280 pairs": {"pairs": 280},
    "sft, 280 pairs": {"objective": "sft", "pairs": 280},
    "dpo, 140 pairs": {"pairs": 140},
    "sft, 140 pairs": {"objective": "sft", "pairs": 140},
    "dpo, rate 2e-3": {"learning_rate": 2e-3},
    "dpo, rate 5e-4": {"learning_rate": 5e-4},
    "sft, rate 2e-3": {"objective": "sft", "learning_rate": 2e-3},
    "sft, rate 5e-4": {"objective": "sft", "learning_rate": 5e-4},
    "dpo, beta 100": {"beta": 100.0},
    "dpo, beta 2000": {"beta": 2000.0},
    "dpo, K = 4 fixed draws": {"fixed_draws_per_row": 4},
    "sft, chosen rendered": {"objective": "sft", "rendered": True},
    "dpo, chosen rendered": {"rendered": True},
}
"""Settings of the arms that train once on the mined pairs: one departure each from the recipe without an SFT term."""
SECOND_STAGES: dict[str, dict[str, Any]] = {
    "sft, then dpo": {},
    "sft, then dpo, sft term": {"sft_weight": 250.0},
    "sft, then more sft": {"objective": "sft"},
}
"""Settings of the second stage, which starts at the adapter of the arm "sft" and trains on its own remaining failures."""
MAIN = ("sft", "dpo", "dpo, sft term")
"""Arms that run first, with all seeds."""
ARMS = ("base", *MAIN, "best of 8", *SECOND_STAGES, *list(SETTINGS)[3:])
"""All arms, the most important ones first."""


def recipe_of(arm: str, seed: int, work: Path) -> tuple[TrainConfig, CompareConfig]:
    """Settings of an arm's training (its output folder is the arm's) and of the evaluation."""
    recipe = read_recipe("faithfulness", "drawings", {"output_dir": str(work)})
    assert isinstance(recipe.compare, CompareConfig)
    training = dataclasses.replace(
        recipe.train,
        sft_weight=0.0,
        steps=STEPS,
        seed=seed,
        eval_fraction=0.0,
        output_dir=str(work / file_name(arm, seed)),
    )
    evaluation = dataclasses.replace(
        recipe.compare, max_prompts=PROMPTS, images_per_prompt=IMAGES, judges=(JUDGE,), output_dir=str(work)
    )
    return training, evaluation


def file_name(arm: str, seed: int) -> str:
    """Name of an arm's files without suffix."""
    return f"{arm.replace(', ', '-').replace(' = ', '').replace(' ', '-')}-seed{seed}"


def train_arm(arm: str, seed: int, work: Path) -> str:
    """Train an arm and return the folder of its adapter. A finished one is not trained again."""
    training, _ = recipe_of(arm, seed, work)
    settings = dict(SECOND_STAGES.get(arm) or SETTINGS.get(arm) or {})
    pairs = resolve_asset(training.pairs)
    if arm in SECOND_STAGES:
        first = train_arm("sft", seed, work)
        pairs = own_failures(first, seed, work)
        training = dataclasses.replace(training, adapter=first, steps=SECOND_STEPS)
    if settings.pop("rendered", False):
        pairs = with_rendered_chosen(pairs, work)
    if number := settings.pop("pairs", None):
        pairs = first_pairs(pairs, number, work)
    is_sft = settings.pop("objective", None) == "sft"
    training = dataclasses.replace(training, pairs=pairs, **settings)
    if is_sft:
        training = dataclasses.replace(sft_baseline_config(training), output_dir=training.output_dir)
    train(training)
    return training.output_dir


def own_failures(adapter: str, seed: int, work: Path) -> str:
    """Mine pairs from an adapter's own images, as those of the base were mined."""
    config = MineConfig(
        "drawings-sd",
        "drawings-train",
        str(work / f"own-failures-seed{seed}"),
        "drawings_agreement",
        adapter=adapter,
        max_prompts=OWN_PROMPTS,
        images_per_prompt=OWN_IMAGES,
        num_inference_steps=10,
        guidance_scale=3.0,
        batch_size=48,
        seed=seed,
    )
    return str(mine_images(config))


def changed_pairs(pairs: str, path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> str:
    """Write changed rows of pairs to a new file, and return its path."""
    if not path.exists():
        rows = change(pq.read_table(pairs).to_pylist())
        write_rows(rows, path, make=make_image_rows, features=image_preference())
    return str(path)


def first_pairs(pairs: str, number: int, work: Path) -> str:
    """Pairs of a random part of the prompts."""

    def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [rows[n] for n in sorted(np.random.default_rng(0).permutation(len(rows))[:number])]

    return changed_pairs(pairs, work / f"pairs-{number}.parquet", choose)


def with_rendered_chosen(pairs: str, work: Path) -> str:
    """The same pairs with a rendered scene of the prompt as the chosen image."""

    def render(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, row in enumerate(rows):
            request = drawing_prompts.parse(row["prompt"])
            scene = drawings.scene_of(request, np.random.default_rng(number))
            row[f"image_{row['preference']}"]["bytes"] = encode_png(drawings.render(scene))
        return rows

    return changed_pairs(pairs, work / "pairs-rendered.parquet", render)


def sample(adapter: str | None, config: CompareConfig, work: Path, label: str) -> ScoredImages:
    """Generate and score the images of a model on the held-out prompts."""
    policy = load_image_policy(config.model, precision=config.precision, adapter=adapter)
    sampler = ImageSampler(policy, config, ImageStore(work / "images"), adapter)
    return sampler.generate(sampling_plan(config), scale=float(adapter is not None), label=label)


def run(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Train and evaluate one arm.

    Returns:
        Prompts, for each image a digit (1: fully correct), the diversity of each prompt's images, and CPU seconds (those of
        training only if it was not resumed).
    """
    training, evaluation = recipe_of(arm, seed, work)
    is_new, start = not Path(training.output_dir).exists(), time.process_time()
    adapter = None if arm in ("base", "best of 8") else train_arm(arm, seed, work)
    trained = time.process_time()
    if arm == "best of 8":
        images = sample(None, dataclasses.replace(evaluation, images_per_prompt=BEST_OF), work, "base-8")
        right = images.scores[JUDGE].reshape(-1, BEST_OF)
        best = {"right": digits(right.max(1)), "right_each": digits(right.ravel()), "diversity": []}
    else:
        images = sample(adapter, evaluation, work, file_name(arm, seed))
        best = {"right": digits(images.scores[JUDGE]), "diversity": diversity(images).round(4).tolist()}
    prompts = list(images.plan.prompts[:: images.plan.samples])
    own = own_pairs_count(arm, seed, work)
    return {
        "arm": arm,
        "seed": seed,
        "command": "python -m tests.bench.drawings docs/benchmarks/drawings",
        "steps": 0 if adapter is None else training.steps,
        **({"own_pairs": own} if own else {}),
        "prompts": prompts,
        **best,
        "train_cpu_seconds": round(trained - start, 1) if adapter and is_new else None,
        "sample_cpu_seconds": round(time.process_time() - trained, 1),
    }


def own_pairs_count(arm: str, seed: int, work: Path) -> int:
    """Number of pairs that the second stage trains on, 0 for other arms."""
    path = work / f"own-failures-seed{seed}" / "pairs.parquet"
    return pq.read_metadata(path).num_rows if arm in SECOND_STAGES else 0


def digits(right: np.ndarray) -> str:
    return "".join(str(int(value)) for value in right)


def jobs(names: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Arms and seeds in their order. The second stages run with all seeds too, the other arms with the first one."""
    order = [("base", seeds[0])]
    order += [(arm, seed) for seed in seeds for arm in MAIN]
    order += [("best of 8", seeds[0])]
    order += [(arm, seed) for seed in seeds for arm in SECOND_STAGES]
    order += [(arm, seeds[0]) for arm in list(SETTINGS)[len(MAIN) :]]
    return [job for job in order if not names or job[0] in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="*", metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/drawings"))
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    for arm, seed in jobs(options.arms, [int(part) for part in options.seeds.split(",")]):
        path = options.out / f"{file_name(arm, seed)}.json"
        if path.exists():
            continue
        with suppress_library_output():
            result = run(arm, seed, options.work)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{arm}, seed {seed}: {np.mean([int(d) for d in result['right']]):.1%} right", flush=True)


if __name__ == "__main__":
    main()
