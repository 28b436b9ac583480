"""Preference pairs from a model's own images: the best of several per prompt against the worst.

Several judges rank together by the mean of their z-scores within a prompt. Guardrail judges prevent one quality from
improving at the expense of another: aesthetics at the expense of the prompt, or one judge's preference at the expense
of another's.

Finished shards are saved, and a restarted run continues after them. Processes share the prompts (RANK of WORLD_SIZE).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpo_mm.config import MineConfig, MineResponsesConfig, as_dict, default_settings
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.lazy_images import source_column
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.prompts import PromptSpec, read_prompt_set, seeds_of
from dpo_mm.data.schema import image_preference, make_image_rows
from dpo_mm.files.checksums import all_intact, missing_shards
from dpo_mm.files.content_key import content_hash, library_versions
from dpo_mm.files.outputs import OutputKind, output_folder, refuse_foreign_folder, settings_of, write_results
from dpo_mm.judges import check_prompts, judge_digests
from dpo_mm.judges.score_checks import higher_is_better_scores
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.diffusion.prompt_sources import check_prompt_sources, images_to_edit
from dpo_mm.policies.families import load_image_policy, model_content
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.printing.progress import progress_bar

logger = logging.getLogger(__name__)


MINING = OutputKind(
    "mining.json",
    "mined",
    results=("pairs.parquet",),
    defaults=default_settings(MineConfig, MineResponsesConfig),
)


def mine_images(config: MineConfig) -> Path:
    """Mine image pairs.

    Args:
        config: model, prompts, judges and sampling.

    Returns:
        Path of the Parquet file of `ImagePreference` rows.

    Raises:
        ValueError: if the folder was mined with other settings or has other files, a setting does not fit, or no pair reaches
            the gap.
    """
    if config.chosen is not None:
        from dpo_mm.mining.own_images import mine_own_images

        return mine_own_images(config)
    if not parse_judges(config.judges):
        raise ValueError("judges missing. Give them in the file or as --judges, or set chosen to own")
    if config.images_per_prompt < 2:
        raise ValueError(f"images_per_prompt is {config.images_per_prompt}. A pair needs at least 2 images per prompt.")
    folder, inputs = Path(config.output_dir), [config.prompts, config.model, config.adapter]
    refuse_foreign_folder(folder, MINING, inputs=inputs)
    prompts = read_prompt_set(config.prompts, limit=config.max_prompts).prompts
    check_prompts([*parse_judges(config.judges), *parse_judges(config.guards)], [prompt.text for prompt in prompts])
    settings = settings_of("mined image pairs", ingredients(config, prompts))
    with output_folder(folder, MINING, settings, inputs=inputs, overwrite=config.overwrite) as finished:
        if not finished:
            _mine(config, prompts)
    return folder / "pairs.parquet"


def _mine(config: MineConfig, prompts: Sequence[PromptSpec]) -> None:
    """Write this process's shards that do not exist yet, and combine them when all exist."""
    folder = Path(config.output_dir)
    shards = [prompts[i : i + config.shard_size] for i in range(0, len(prompts), config.shard_size)]
    paths = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    empty_message = (
        f"{config.output_dir}: no two of the {config.images_per_prompt} images of any prompt differ by more than "
        f"{config.min_score_gap:g} on {'+'.join(parse_judges(config.judges))}. Increase images_per_prompt or lower "
        "min_score_gap."
    )
    _mine_shards(shards, paths, config)
    if all_intact(paths, folder / "pairs.parquet"):
        with write_results(folder) as temporary:
            combine_shards(paths, temporary / "pairs.parquet", empty_message=empty_message)


def _mine_shards(shards: Sequence[Sequence[PromptSpec]], paths: Sequence[Path], config: MineConfig) -> None:
    """Write this process's shards that do not exist yet."""
    missing = missing_shards(paths)
    if not missing:
        return
    options = {"precision": config.precision, "quantize": config.quantize}
    policy = load_image_policy(config.model, revision=config.revision, adapter=config.adapter, **options)
    texts, sources = zip(*((prompt.text, prompt.sources) for shard in shards for prompt in shard), strict=True)
    check_prompt_sources(policy, config.prompts, texts, sources)
    several = any(len(images) > 1 for images in sources)
    if cut := truncated_prompts(policy, texts):
        logger.warning("prompts: %s", cut)
    total = sum(len(shards[number]) for number in missing) * config.images_per_prompt
    with progress_bar("generating and scoring images", total) as advance:
        for number in missing:
            rows = _mine_shard(policy, shards[number], config, advance, several=several)
            write_rows(rows, paths[number], make=make_image_rows, features=image_preference(several_sources=several))


def ingredients(config: MineConfig, prompts: Sequence[PromptSpec]) -> dict[str, Any]:
    """Return what decides the mined pairs, see `dpo_mm.files.content_key`."""
    return {
        "settings": as_dict(config),
        "model": model_content(config.model, revision=config.revision),
        "adapter": adapter_content(config.adapter),
        "prompts": content_hash([prompt.item for prompt in prompts]),
        "judges": judge_digests([*parse_judges(config.judges), *parse_judges(config.guards)]),
        "libraries": library_versions(),
    }


def parse_judges(judges: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """Return the judges of a setting that is a list, a text with commas, or None."""
    return tuple(judges.split(",")) if isinstance(judges, str) else judges or ()


def _mine_shard(
    policy: ImagePolicy, prompts: Sequence[PromptSpec], config: MineConfig, advance: Any, *, several: bool
) -> list[dict[str, Any]]:
    """Generate and score the images of some prompts and return the rows of their pairs."""
    judges, guards = parse_judges(config.judges), parse_judges(config.guards)
    count = config.images_per_prompt
    repeated = [prompt.text for prompt in prompts for _ in range(count)]
    sources = [prompt.sources for prompt in prompts for _ in range(count)]
    seeds = [
        seed
        for prompt in prompts
        for seed in seeds_of(prompt.text, count, seed=config.seed, sources=prompt.sources.file_hashes)
    ]
    images: list[Image.Image] = []
    for batch in policy.sample(
        repeated,
        seeds,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        batch_size=config.batch_size,
        **images_to_edit(sources),
    ):
        images += batch
        advance(len(batch))
    scores_of = lambda names: [higher_is_better_scores(name, images, repeated, sources) for name in names]
    scores = np.array([mean_z_score(scores_of(judges), count), *scores_of(guards)])
    rows = []
    for number, prompt in enumerate(prompts):
        part = slice(number * count, (number + 1) * count)
        for best, worst in choose_pairs(scores[:, part], config.min_score_gap, config.pairs_per_prompt):
            own = (images[part], seeds[part], scores[0, part])
            rows.append(_row(prompt, *own, best, worst, config, several=several))
    return rows


def mean_z_score(scores: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """Combine the scores of several judges into one ranking.

    Args:
        scores: scores of each judge, (images,), a prompt's images together, higher is better.
        samples: images per prompt.

    Returns:
        Mean over judges of the z-score within each prompt, (images,). The scores of a single judge are returned
        unchanged. A judge that scores all images of a prompt equally contributes 0 there.
    """
    if len(scores) == 1:
        return scores[0]
    by_prompt = np.array(scores, dtype=float).reshape(len(scores), -1, samples)
    deviation = by_prompt.std(-1, keepdims=True)
    centred = by_prompt - by_prompt.mean(-1, keepdims=True)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 1e-12).mean(0).ravel()


def choose_pairs(scores: np.ndarray, min_score_gap: float, count: int) -> list[tuple[int, int]]:
    """Pair the images of one prompt: best with worst, second best with second worst, and so on.

    Args:
        scores: (1 + guards, images). The first row ranks. In every other row, chosen must not be lower than rejected.
        min_score_gap: chosen and rejected differ by more than this in the first row.
        count: maximum number of pairs. Each image is in at most one.

    Returns:
        Indices (chosen, rejected) of each pair.
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
    prompt: PromptSpec,
    images: list[Image.Image],
    seeds: list[int],
    scores: np.ndarray,
    best: int,
    worst: int,
    config: MineConfig,
    *,
    several: bool,
) -> dict[str, Any]:
    """Build a pair's row. The winner's seed decides whether it is a or b: the position carries no signal."""
    first, second, preference = (best, worst, "a") if seeds[best] % 2 else (worst, best, "b")
    guards = "+".join(parse_judges(config.guards))
    sources = [{"bytes": encode_png(image), "path": None} for image in prompt.sources]
    return {
        "id": f"{prompt.item}/{seeds[best]}-{seeds[worst]}",
        "prompt": prompt.text,
        **({"image_source": source_column(sources, several=several)} if sources else {}),
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
        "group_id": prompt.item,
        "source": f"mined with {'+'.join(parse_judges(config.judges))}" + (f", guarded by {guards}" if guards else ""),
    }
