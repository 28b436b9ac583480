"""What new labels are worth when a quarter of the old ones is wrong: the shapes world, trained on each.

    python -m tests.bench.relabel --out docs/benchmarks/relabel.json      # about 3 minutes an arm on an idle core

The shipped faithfulness pairs with 25 % of the labels turned round. The exact judge of that world would put all of them
right again, which says nothing of judges as they are; so the judges here are weak on purpose: each sees the truth of a
picture and gets it wrong for a quarter of all pictures, its own quarter, drawn by a hash. Every arm is the shipped recipe
(300 steps) with another set of labels, judged by the exact judge on the same held-out prompts and seeds.
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
"""Share of labels turned round; share of pictures that a weak judge gets wrong."""


def weak(number: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The exact judge, wrong about a quarter of all pictures."""
    found = []
    for image, true in zip(images, faithfulness(images, prompts), strict=True):
        digest = hashlib.blake2b(image.tobytes(), digest_size=4, salt=bytes([number])).digest()
        found.append(1 - true if int.from_bytes(digest, "little") < WEAK * 2**32 else true)
    return found


weak_0, weak_1, weak_2, weak_3, weak_4 = (functools.partial(weak, number) for number in range(5))
FIVE = tuple(f"tests.bench.relabel:weak_{number}" for number in range(5))


def turned(rows: Any, seed: int) -> Any:
    """The set with a quarter of its labels turned round, scores with them."""
    wrong = set(np.random.default_rng(seed).permutation(len(rows))[: int(WRONG * len(rows))].tolist())

    def turn(row: dict[str, Any], n: int) -> dict[str, Any]:
        if n not in wrong:
            return {}
        other = {"a": "b", "b": "a"}[row["preference"]]
        return {"preference": other, "score_a": row["score_b"], "score_b": row["score_a"]}

    return rows.map(turn, with_indices=True)


def right(path: str, truth: dict[str, str]) -> dict[str, int]:
    rows = load_pairs(path)
    pairs = [(truth[name], said) for name, said in zip(rows["id"], rows["preference"], strict=True)]
    return {
        "right": sum(a == b for a, b in pairs),
        "wrong": sum({a, b} == {"a", "b"} for a, b in pairs),
        "ties": sum(b == "tie" for _, b in pairs),
    }


def draw(adapter: str | None, recipe: Any) -> np.ndarray:
    """Scores of the exact judge on the recipe's held-out prompts and seeds."""
    config = recipe.compare
    policy = load_policy(config.model)
    if adapter:
        policy.load_adapter(adapter)
    names = read_prompts(config.prompts, limit=config.max_prompts)
    prompts = [name for name in names for _ in range(config.images_per_prompt)]
    seeds = [seed for name in names for seed in seeds_of(name, config.images_per_prompt, seed=config.seed)]
    scores: list[float] = []
    how = {"steps": config.num_inference_steps, "guidance": config.guidance_scale, "batch_size": config.batch_size}
    for images in policy.sample(prompts, seeds, **how):
        scores += faithfulness(images, prompts[len(scores) : len(scores) + len(images)])
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="docs/benchmarks/relabel.json")
    parser.add_argument("--work", default="runs/bench-relabel")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe("faithfulness", "shapes", {"seed": str(given.seed), "output_dir": str(work)})
    rows = load_pairs("shapes-faithfulness")
    truth = dict(zip(rows["id"], rows["preference"], strict=True))
    bad = str(work / "turned.parquet")
    turned(rows, given.seed).to_parquet(bad)

    def new(name: str, judges: tuple[str, ...], **more: Any) -> str:
        path = str(work / f"{name}.parquet")
        relabel(RelabelConfig(bad, judges, path, **more))
        return path

    five, trusted = new("five", FIVE), new("five-trust", FIVE, scale="labels", trust=0.75)
    arms = {
        "a quarter turned round": (bad, "sigmoid"),
        "relabelled by five weak judges": (five, "sigmoid"),
        "relabelled by one weak judge": (new("one", FIVE[:1]), "sigmoid"),
        "labels as shipped": ("shapes-faithfulness", "sigmoid"),
        "relabelled by five weak judges, soft labels": (five, "soft"),
        "relabelled by five weak judges and the old labels (trust 0.75), soft labels": (trusted, "soft"),
    }
    names = read_prompts(recipe.compare.prompts, limit=recipe.compare.max_prompts)  # type: ignore[union-attr]
    clusters = np.array([name for name in names for _ in range(recipe.compare.images_per_prompt)])
    base, found = draw(None, recipe), []
    for name, (pairs, objective) in arms.items():
        config = dataclasses.replace(
            recipe.train,
            pairs=pairs,
            objective=objective,
            steps=given.steps,
            output_dir=str(work / name.replace(" ", "-")),
        )
        one = paired(
            base, draw(str(train(config).folder), recipe), clusters=clusters, metric=name, judge="faithfulness"
        )
        of = {"base": one.base, "tuned": one.tuned, "difference": one.difference, "low": one.low, "high": one.high}
        found.append({"arm": name, "objective": objective, "labels": right(pairs, truth), **of})
        about = {
            "command": "python -m tests.bench.relabel",
            "steps": given.steps,
            "seed": given.seed,
            "pairs": len(rows),
        }
        Path(given.out).write_text(json.dumps({**about, "pictures": len(base), "arms": found}, indent=1) + "\n")
        print(found[-1], flush=True)


if __name__ == "__main__":
    main()
