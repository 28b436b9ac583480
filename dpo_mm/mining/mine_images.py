"""Preference pairs from a model's own samples: draw several pictures a prompt, judge them, pair best with worst.

Several judges rank together, by the mean of their z-scores within a prompt, and guards keep a second axis from falling:
prettiness is not to be bought with disobedience, nor one judge's taste with another's.

Finished shards are kept; a restarted run goes on after them. Processes share the prompts (RANK of WORLD_SIZE).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dpo_mm.config import MineConfig, as_dict
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.prompts import read_prompts, seeds_of
from dpo_mm.data.schema import image_preference, make_image_rows
from dpo_mm.judges import better_of, load_judge
from dpo_mm.policies.families import load_image_policy
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import check_settings_unchanged, exit_cleanly_on_sigterm, missing_shards

if TYPE_CHECKING:
    pass


def mine_images(config: MineConfig) -> Path:
    """Mine pairs as the config says; returns the Parquet file of `ImagePreference` rows.

    Raises ValueError where the folder was mined with other settings, or where no pair reaches the gap.
    """
    if config.images_per_prompt < 2:
        raise ValueError(
            f"images_per_prompt is {config.images_per_prompt}; a pair needs at least 2 pictures of a prompt"
        )
    folder = Path(config.output_dir)
    prompts = read_prompts(config.prompts, limit=config.max_prompts)
    check_settings_unchanged(folder, as_dict(config), done="mined")
    shards = [prompts[i : i + config.shard_size] for i in range(0, len(prompts), config.shard_size)]
    places = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    left = missing_shards(places)
    if left:
        policy = load_image_policy(
            config.model, revision=config.revision, precision=config.precision, adapter=config.adapter
        )
        total = sum(len(shards[n]) for n in left) * config.images_per_prompt
        with exit_cleanly_on_sigterm(), progress_bar("drawing and judging", total) as advance:
            for number in left:
                rows = _mine_shard(policy, shards[number], config, advance)
                write_rows(rows, places[number], make=make_image_rows, features=image_preference())
    nothing = (
        f"{config.output_dir}: no two of {config.images_per_prompt} samples of any prompt differ by more than {config.min_score_gap:g} "
        f"on {'+'.join(parse_judges(config.judges))}; draw more samples or lower min_score_gap"
    )
    return combine_shards(places, folder / "pairs.parquet", nothing=nothing)


def parse_judges(judges: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """Judges of a setting: a list, or a text with commas."""
    return tuple(judges.split(",")) if isinstance(judges, str) else judges or ()


def _mine_shard(policy: ImagePolicy, prompts: Sequence[str], config: MineConfig, advance: Any) -> list[dict[str, Any]]:
    judges, guards = parse_judges(config.judges), parse_judges(config.guards)
    named = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
    seeds = [seed for prompt in prompts for seed in seeds_of(prompt, config.images_per_prompt, seed=config.seed)]
    images: list[Image.Image] = []
    for drawn in policy.sample(
        named, seeds, steps=config.num_inference_steps, guidance=config.guidance_scale, batch_size=config.batch_size
    ):
        images += drawn
        advance(len(drawn))
    ranking = mean_z_score([higher_is_better_scores(name, images, named) for name in judges], config.images_per_prompt)
    scores = np.array([ranking, *(higher_is_better_scores(name, images, named) for name in guards)])
    rows = []
    for number in range(len(prompts)):
        part = slice(number * config.images_per_prompt, (number + 1) * config.images_per_prompt)
        for best, worst in choose_pairs(scores[:, part], config.min_score_gap, config.pairs_per_prompt):
            rows.append(_row(named[part][0], images[part], seeds[part], scores[0, part], best, worst, config))
    return rows


def higher_is_better_scores(name: str, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """A judge's scores, (pictures,), turned round where lower is better."""
    scores = np.array(load_judge(name)(images, prompts))
    return -scores if better_of(name) == "lower" else scores


def mean_z_score(scores: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """One ranking of several judges' scores, (pictures,): the mean of z-scores within each prompt; of one, its own.

    A judge that finds a prompt's pictures all alike says nothing there (z = 0).
    """
    if len(scores) == 1:
        return scores[0]
    each = np.array(scores, dtype=float).reshape(len(scores), -1, samples)
    spread = each.std(-1, keepdims=True)
    centred = each - each.mean(-1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 1e-12).mean(0).ravel()


def choose_pairs(scores: np.ndarray, min_score_gap: float, count: int) -> list[tuple[int, int]]:
    """(chosen, rejected) of one prompt's samples: best with worst, second with second to last, and so on.

    scores: (1 + guards, samples); the first row ranks, by more than `min_score_gap`; on each other, chosen must not be lower.
    """
    order = np.argsort(-scores[0], kind="stable")
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for best in order:
        for worst in order[::-1]:
            if len(pairs) == count or scores[0, best] - scores[0, worst] <= min_score_gap:
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
    guards = "+".join(parse_judges(config.guards))
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
        "axis": "+".join(parse_judges(config.judges)),
        "model_a": config.model,
        "model_b": config.model,
        "group_id": prompt,
        "source": f"mined with {'+'.join(parse_judges(config.judges))}" + (f", guarded by {guards}" if guards else ""),
    }
