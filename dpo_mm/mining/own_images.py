"""Preference pairs from captioned images: the image of the dataset is chosen, and the model's image for its caption is rejected.

No judge is needed. Finished shards are saved, and a restarted run continues after them. Processes share the shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.config import MineConfig, as_dict
from dpo_mm.data.image_files import encode_png, image_bytes, rgb_image
from dpo_mm.data.lazy_images import LazyImages, lazy_images, source_cells, source_column
from dpo_mm.data.load_pairs import has_source_lists
from dpo_mm.data.parquet import combine_shards, write_rows
from dpo_mm.data.prompts import seeds_of
from dpo_mm.data.row_digest import digest
from dpo_mm.data.schema import image_preference, make_image_rows
from dpo_mm.files.checksums import all_intact, missing_shards
from dpo_mm.files.content_key import library_versions
from dpo_mm.files.outputs import output_folder, refuse_foreign_folder, settings_of, write_results
from dpo_mm.mining.mine_images import MINING
from dpo_mm.policies.adapter_sources import adapter_content
from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.diffusion.prompt_sources import check_prompt_sources, images_to_edit
from dpo_mm.policies.families import load_image_policy, model_content
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.sources.local_pairs import load_image_pairs

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

BY_JUDGES = ("judges", "guards", "images_per_prompt", "min_score_gap")
"""Settings of mining by judges."""


def mine_own_images(config: MineConfig) -> Path:
    """Pair each image of a dataset with images that the model generates for its caption.

    Args:
        config: the model, how it samples, and the dataset in `prompts`.

    Returns:
        Path of the Parquet file of `ImagePreference` rows.

    Raises:
        ValueError: if the dataset has no captioned images, a setting needs judges, or the folder was mined with other settings.
    """
    if config.chosen != "own":
        raise ValueError(f"chosen is {config.chosen!r}. Expected own, or leave it out for judges to choose")
    given = [name for name in BY_JUDGES if getattr(config, name) != getattr(MineConfig, name)]
    if given:
        raise ValueError(f"{given[0]} has no effect with chosen own, because no judge ranks the images. Remove it")
    folder, inputs = Path(config.output_dir), [config.prompts, config.model, config.adapter]
    refuse_foreign_folder(folder, MINING, inputs=inputs)
    rows, content = _own_images(config)
    parts: dict[str, Any] = {
        "settings": as_dict(config),
        "model": model_content(config.model, revision=config.revision),
    }
    parts |= {
        "adapter": adapter_content(config.adapter),
        "prompts": content,
        "judges": {},
        "libraries": library_versions(),
    }
    settings = settings_of("mined image pairs", parts)
    with output_folder(folder, MINING, settings, inputs=inputs, overwrite=config.overwrite) as finished:
        if not finished:
            _mine(config, rows)
    return folder / "pairs.parquet"


def _own_images(config: MineConfig) -> tuple[Dataset, str]:
    """Return the rows that have a chosen image, and the digest of the dataset."""
    dataset = load_image_pairs(config.prompts)
    has = {side: dataset.data.column(f"image_{side}").is_valid().to_pylist() for side in ("a", "b")}
    sides = dataset["preference"]
    numbers = [number for number, side in enumerate(sides) if side in has and has[side][number]]
    if not numbers:
        raise ValueError(f"{config.prompts}: no row has a chosen image. Give a folder of captioned images")
    return dataset.select(numbers[: config.max_prompts]), digest(dataset)


def _mine(config: MineConfig, rows: Dataset) -> None:
    """Write this process's shards that do not exist yet, and combine them when all exist."""
    folder = Path(config.output_dir)
    shards = [range(len(rows))[i : i + config.shard_size] for i in range(0, len(rows), config.shard_size)]
    paths = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    if missing := missing_shards(paths):
        options = {"precision": config.precision, "quantize": config.quantize}
        policy = load_image_policy(config.model, revision=config.revision, adapter=config.adapter, **options)
        if cut := truncated_prompts(policy, list(rows["prompt"])):
            logger.warning("prompts: %s", cut)
        total = sum(len(shards[number]) for number in missing) * config.pairs_per_prompt
        with progress_bar("generating images", total) as advance:
            for number in missing:
                own = rows.select(shards[number]).with_format("arrow")[:].to_pylist()
                sources = [_source(row, config.prompts) for row in own]
                check_prompt_sources(policy, config.prompts, [row["prompt"] for row in own], sources)
                pairs = _pair_with_samples(policy, own, config, advance)
                features = image_preference(several_sources=has_source_lists(rows))
                write_rows(pairs, paths[number], make=make_image_rows, features=features)
    if all_intact(paths, folder / "pairs.parquet"):
        with write_results(folder) as temporary:
            combine_shards(paths, temporary / "pairs.parquet", empty_message=f"{config.prompts}: no pair")


def _pair_with_samples(
    policy: ImagePolicy, rows: Sequence[dict[str, Any]], config: MineConfig, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Generate `pairs_per_prompt` images for each caption, and return the rows of their pairs."""
    repeated = [row for row in rows for _ in range(config.pairs_per_prompt)]
    seeds = [seed for row in rows for seed in seeds_of(row["id"], config.pairs_per_prompt, seed=config.seed)]
    for row in rows:
        try:
            rgb_image(_own_image(row))
        except ValueError as error:
            raise ValueError(
                f"{config.prompts}, row {row['id']}: its image does not decode ({error}). Remove it"
            ) from None
    samples = policy.sample(
        [row["prompt"] for row in repeated],
        seeds,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        batch_size=config.batch_size,
        **images_to_edit([_source(row, config.prompts) for row in repeated]),
    )
    images = []
    for batch in samples:
        images += batch
        advance(len(batch))
    pairs = []
    for row, seed, image in zip(repeated, seeds, images, strict=True):
        own = {"image": {"bytes": image_bytes(_own_image(row)), "path": None}, "model": None, "seed": None}
        sample = {"image": {"bytes": encode_png(image), "path": None}, "model": config.model, "seed": seed}
        first, second = (own, sample) if seed % 2 else (sample, own)  # the position carries no signal
        pairs.append(
            {
                "id": f"{row['id']}/{seed}",
                "prompt": row["prompt"],
                "image_source": source_column(
                    [{"bytes": image_bytes(cell), "path": None} for cell in source_cells(row)],
                    several=isinstance(row["image_source"], list),
                ),
                "preference": "a" if first is own else "b",
                **{f"{name}_a": value for name, value in first.items()},
                **{f"{name}_b": value for name, value in second.items()},
                "group_id": row["prompt"],
                "source": "own images against samples",
            }
        )
    return pairs


def _source(row: dict[str, Any], dataset: str) -> LazyImages:
    """Return the images to edit of a row, empty without one."""
    return lazy_images(source_cells(row), f"{dataset}, row {row['id']}")


def _own_image(row: dict[str, Any]) -> Any:
    return row[f"image_{row['preference']}"]
