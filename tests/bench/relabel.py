"""Measure the value of new labels when a quarter of the old ones is wrong, by training on each.

    python -m tests.bench.relabel --out docs/benchmarks/relabel.json      # about 3 minutes per arm on an idle core

The dataset is the bundled faithfulness pairs with 25 % of the labels swapped. The exact judge of this synthetic task would
correct all of them, which real judges cannot. So the judges here are weak on purpose: each knows the ground truth of an
image and is wrong for a quarter of all images, chosen by a hash that differs per judge. Every arm is the bundled recipe
(300 steps) with other labels, evaluated by the exact judge on the same held-out prompts and seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpo_mm.config import RelabelConfig
from dpo_mm.data.prompts import read_prompts, seeds_of
from dpo_mm.data.schema import load_pairs
from dpo_mm.evaluation.statistics import paired
from dpo_mm.judges.relabel import relabel
from dpo_mm.judges.scene import faithfulness
from dpo_mm.policies.families import load_policy
from dpo_mm.recipe import read_recipe
from dpo_mm.training.run import train

WRONG, WEAK = 0.25, 0.25
"""Fraction of labels that are swapped, and fraction of images that a weak judge gets wrong."""


def weak(number: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The exact judge with wrong scores for a quarter of all images, chosen by a hash."""
    scores = []
    for image, score in zip(images, faithfulness(images, prompts), strict=True):
        digest = hashlib.blake2b(image.tobytes(), digest_size=4, salt=bytes([number])).digest()
        scores.append(1 - score if int.from_bytes(digest, "little") < WEAK * 2**32 else score)
    return scores


weak_0, weak_1, weak_2, weak_3, weak_4 = (functools.partial(weak, number) for number in range(5))
FIVE = tuple(f"tests.bench.relabel:weak_{number}" for number in range(5))


def swap_labels(rows: Any, seed: int) -> Any:
    """Swap a quarter of the dataset's labels, together with their scores."""
    wrong = set(np.random.default_rng(seed).permutation(len(rows))[: int(WRONG * len(rows))].tolist())

    def swap(row: dict[str, Any], n: int) -> dict[str, Any]:
        if n not in wrong:
            return {}
        other = {"a": "b", "b": "a"}[row["preference"]]
        return {"preference": other, "score_a": row["score_b"], "score_b": row["score_a"]}

    return rows.map(swap, with_indices=True)


def count_labels(path: str, true_preferences: dict[str, str]) -> dict[str, int]:
    """Count right and wrong labels and ties, by the original preferences."""
    rows = load_pairs(path)
    pairs = [
        (true_preferences[name], preference) for name, preference in zip(rows["id"], rows["preference"], strict=True)
    ]
    return {
        "right": sum(a == b for a, b in pairs),
        "wrong": sum({a, b} == {"a", "b"} for a, b in pairs),
        "ties": sum(b == "tie" for _, b in pairs),
    }


def score_held_out_images(adapter: str | None, recipe: Any) -> np.ndarray:
    """Scores of the exact judge on the recipe's held-out prompts and seeds."""
    config = recipe.compare
    policy = load_policy(config.model)
    if adapter:
        policy.load_adapter(adapter)
    names = read_prompts(config.prompts, limit=config.max_prompts)
    prompts = [name for name in names for _ in range(config.images_per_prompt)]
    seeds = [seed for name in names for seed in seeds_of(name, config.images_per_prompt, seed=config.seed)]
    scores: list[float] = []
    sampling = {"steps": config.num_inference_steps, "guidance": config.guidance_scale, "batch_size": config.batch_size}
    for images in policy.sample(prompts, seeds, **sampling):
        scores += faithfulness(images, prompts[len(scores) : len(scores) + len(images)])
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="docs/benchmarks/relabel.json")
    parser.add_argument("--work", default="runs/bench-relabel")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe("faithfulness", "shapes", {"seed": str(options.seed), "output_dir": str(work)})
    rows = load_pairs("shapes-faithfulness")
    true_preferences = dict(zip(rows["id"], rows["preference"], strict=True))
    swapped = str(work / "turned.parquet")
    swap_labels(rows, options.seed).to_parquet(swapped)

    def relabel_with(name: str, judges: tuple[str, ...], **more: Any) -> str:
        path = str(work / f"{name}.parquet")
        relabel(RelabelConfig(swapped, judges, path, **more))
        return path

    five, trusted = relabel_with("five", FIVE), relabel_with("five-trust", FIVE, scale="labels", trust=0.75)
    arms = {
        "a quarter turned round": (swapped, "sigmoid"),
        "relabelled by five weak judges": (five, "sigmoid"),
        "relabelled by one weak judge": (relabel_with("one", FIVE[:1]), "sigmoid"),
        "labels as shipped": ("shapes-faithfulness", "sigmoid"),
        "relabelled by five weak judges, soft labels": (five, "soft"),
        "relabelled by five weak judges and the old labels (trust 0.75), soft labels": (trusted, "soft"),
    }
    names = read_prompts(recipe.compare.prompts, limit=recipe.compare.max_prompts)  # type: ignore[union-attr]
    clusters = np.array([name for name in names for _ in range(recipe.compare.images_per_prompt)])
    base, results = score_held_out_images(None, recipe), []
    for name, (pairs, objective) in arms.items():
        config = dataclasses.replace(
            recipe.train,
            pairs=pairs,
            objective=objective,
            steps=options.steps,
            output_dir=str(work / name.replace(" ", "-")),
        )
        comparison = paired(
            base,
            score_held_out_images(str(train(config).folder), recipe),
            clusters=clusters,
            metric=name,
            judge="faithfulness",
        )
        effect = {
            "base": comparison.base,
            "tuned": comparison.tuned,
            "difference": comparison.difference,
            "low": comparison.low,
            "high": comparison.high,
        }
        results.append({"arm": name, "objective": objective, "labels": count_labels(pairs, true_preferences), **effect})
        about = {
            "command": "python -m tests.bench.relabel",
            "steps": options.steps,
            "seed": options.seed,
            "pairs": len(rows),
        }
        Path(options.out).write_text(json.dumps({**about, "pictures": len(base), "arms": results}, indent=1) + "\n")
        print(results[-1], flush=True)


if __name__ == "__main__":
    main()
