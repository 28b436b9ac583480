"""Preference pairs from a model's own samples: draw several pictures a prompt, judge them, pair best with worst.

Finished shards are kept; a restarted run goes on after them. Processes share the prompts (RANK of WORLD_SIZE).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dpo_mm.config import MineConfig, as_dict
from dpo_mm.judges import load_judge
from dpo_mm.pictures import encode_png
from dpo_mm.policies.protocol import load_policy
from dpo_mm.progress import progress
from dpo_mm.prompts import read_prompts, seeds_of
from dpo_mm.schema import image_preference, make_image_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features

PLAN_FILE = "mining.json"


def mine(config: MineConfig) -> Path:
    """Mine pairs as the config says; returns the Parquet file of `ImagePreference` rows.

    Raises ValueError where the folder was mined with other settings, or where no pair reaches the gap.
    """
    if config.samples < 2:
        raise ValueError(f"samples is {config.samples}; a pair needs at least 2 pictures of a prompt")
    folder = Path(config.output_dir)
    prompts = read_prompts(config.prompts, limit=config.limit)
    same_plan(folder, config)
    shards = [prompts[i : i + config.shard_size] for i in range(0, len(prompts), config.shard_size)]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    places = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    left = [n for n in range(rank, len(shards), world) if not places[n].exists()]
    if left:
        policy = load_policy(config.model, revision=config.revision, precision=config.precision)
        if config.adapter:
            policy.attach(config.adapter)
        with progress("drawing and judging", sum(len(shards[n]) for n in left) * config.samples) as advance:
            for number in left:
                rows = _mine_shard(policy, shards[number], config, advance)
                write_rows(rows, places[number], make=make_image_rows, features=image_preference())
    nothing = (
        f"{config.output_dir}: no two of {config.samples} samples of any prompt differ by more than {config.min_gap:g} "
        f"on {config.judge}; draw more samples or lower min_gap"
    )
    return combine(places, folder / "pairs.parquet", nothing=nothing)


def same_plan(folder: Path, config: Any) -> None:
    """Note what a folder is mined with. Raises ValueError where it was begun with other settings, and which."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, file = json.loads(json.dumps(as_dict(config))), folder / PLAN_FILE
    if file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{key}: {before.get(key)!r} -> {value!r}" for key, value in plan.items() if before.get(key) != value
        ]
        changed = [line for line in changed if not line.startswith(("output_dir", "batch_size"))]
        if changed:
            raise ValueError(
                f"{folder} was mined with other settings ({'; '.join(changed)}); choose another output_dir"
            )
    file.write_text(json.dumps(plan, indent=1))


def _mine_shard(policy: Any, prompts: Sequence[str], config: MineConfig, advance: Any) -> list[dict[str, Any]]:
    judges = [load_judge(name) for name in (config.judge, config.guard) if name]
    named = [prompt for prompt in prompts for _ in range(config.samples)]
    seeds = [seed for prompt in prompts for seed in seeds_of(prompt, config.samples, seed=config.seed)]
    images: list[Image.Image] = []
    for drawn in policy.sample(
        named, seeds, steps=config.sampling_steps, guidance=config.guidance, batch_size=config.batch_size
    ):
        images += drawn
        advance(len(drawn))
    scores = np.array([judge(images, named) for judge in judges])
    rows = []
    for number in range(len(prompts)):
        part = slice(number * config.samples, (number + 1) * config.samples)
        for best, worst in choose_pairs(scores[:, part], config.min_gap, config.pairs_per_prompt):
            rows.append(_row(named[part][0], images[part], seeds[part], scores[0, part], best, worst, config))
    return rows


def choose_pairs(scores: np.ndarray, min_gap: float, count: int) -> list[tuple[int, int]]:
    """(chosen, rejected) of one prompt's samples: best with worst, second with second to last, and so on.

    scores: (judges, samples); the first judge ranks, by more than `min_gap`; on a second, chosen must not be lower.
    """
    order = np.argsort(-scores[0], kind="stable")
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for best in order:
        for worst in order[::-1]:
            if len(pairs) == count or scores[0, best] - scores[0, worst] <= min_gap:
                break
            if not used & {int(best), int(worst)} and (scores[1:, best] >= scores[1:, worst]).all():
                pairs.append((int(best), int(worst)))
                used |= {int(best), int(worst)}
                break
    return pairs


def _row(
    prompt: str,
    images: list[Image.Image],
    seeds: list[int],
    scores: np.ndarray,
    best: int,
    worst: int,
    config: MineConfig,
) -> dict[str, Any]:
    """A row whose winner stands on the side that its seed decides, so that the side says nothing."""
    first, second, preference = (best, worst, "a") if seeds[best] % 2 else (worst, best, "b")
    return {
        "id": f"{prompt}/{seeds[best]}-{seeds[worst]}",
        "prompt": prompt,
        "image_a": {"bytes": encode_png(images[first]), "path": None},
        "image_b": {"bytes": encode_png(images[second]), "path": None},
        "preference": preference,
        "score_a": float(scores[first]),
        "score_b": float(scores[second]),
        "seed_a": seeds[first],
        "seed_b": seeds[second],
        "axis": config.judge,
        "model_a": config.model,
        "model_b": config.model,
        "group_id": prompt,
        "source": f"mined with {config.judge}" + (f", guarded by {config.guard}" if config.guard else ""),
    }


def write_rows(rows: list[dict[str, Any]], path: Path, *, make: Callable[..., Dataset], features: Features) -> None:
    """Rows as Parquet, written aside and renamed; a shard without pairs is an empty file of the same columns."""
    from datasets import Dataset

    found = make(rows) if rows else Dataset.from_dict({name: [] for name in features}, features=features)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    found.to_parquet(str(aside))
    aside.replace(path)


def combine(places: list[Path], target: Path, *, nothing: str) -> Path:
    """Shards as one file, once all are there. Raises ValueError with `nothing` where they hold no row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not all(place.exists() for place in places):
        return target
    table = pa.concat_tables([pq.read_table(place) for place in places])
    if table.num_rows == 0:
        raise ValueError(nothing)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    pq.write_table(table, aside)
    aside.replace(target)
    return target
