"""Encode frozen parts once: latents of the autoencoder and prompt embeddings, in Arrow on disk.

The cache key is a hash of model, preprocessing and data, so that a second run starts at once. Shards are written to a temporary
folder and then renamed. An interrupted run resumes with the shard it was at, and several processes share the shards. The cache
has the posterior's mean and standard deviation, not one sample, so that a fresh sample in each epoch equals encoding in the step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import ImageOps

from dpo_mm.config import TrainConfig
from dpo_mm.data.clips import check_clip_width, clip_frames, clip_image
from dpo_mm.data.load_pairs import (
    Pairs,
    check_equal_sources,
    check_source_images,
    check_source_proportions,
    data_columns,
)
from dpo_mm.data.row_digest import digest
from dpo_mm.data.several_captions import CAPTIONS, has_captions, texts_of
from dpo_mm.errors import name_row
from dpo_mm.files.cache_folder import cache_folder, create_cache
from dpo_mm.files.checksums import COMPLETE, saved_shards, with_checksum
from dpo_mm.files.content_key import content_hash, content_key, library_versions
from dpo_mm.files.resumable import atomic_write
from dpo_mm.policies.diffusion.buckets import bucket_for, buckets_of
from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.diffusion.prompt_sources import source_name
from dpo_mm.policies.diffusion.row_variants import FLIPPED
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.process.process_rank import ProcessRank, process_rank
from dpo_mm.training import arrow_shards
from dpo_mm.training.coupled_rows import CoupledRows
from dpo_mm.training.encoded_pairs import EncodedPairs, read_complete
from dpo_mm.training.evaluation_split import split_digests
from dpo_mm.training.prompt_keys import (
    PromptKey,
    check_shown_sources,
    example_image,
    example_prompt,
    key_of,
    prompt_keys,
)
from dpo_mm.training.response_rows import QUARANTINE, EncodedSplits, encode_responses
from dpo_mm.training.shared_work import wait_for_files
from dpo_mm.training.training_rows import TrainingRows, liked_and_disliked, load_training_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHARD = 256
PIXELS, TOKENS = 32 * 256**2, SHARD * 77
"""Largest input of the encoders at a time: pixels of images, tokens of prompts."""


class EncodingJob(NamedTuple):
    """Rows to encode, how to encode them, and the folder for the result."""

    policy: ImagePolicy
    pairs: Pairs
    folder: Path
    sizes: tuple[tuple[int, int], ...]
    precision: str
    rank: ProcessRank
    empty_prompt: bool
    flipped: bool

    @property
    def sides(self) -> tuple[str, ...]:
        """Sides of a row, whose images come before the images to edit."""
        return ("chosen",) if self.pairs.one_sided else ("chosen", "rejected")

    def prompts(self) -> list[PromptKey]:
        """Return the prompts to encode."""
        return prompt_keys(self.policy, self.pairs.rows, empty_prompt=self.empty_prompt)

    def size_of(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """Return the width and height to which the images of a decoded row are fitted. Those of clips are a frame's."""
        frames, sizes = self.policy.frames, [image.size for image in row["images"][: len(self.sides)]]
        with name_row(f"row {row['id']} of {self.pairs.dataset_name}", "Join the frames of the clip again"):
            for size in sizes:
                check_clip_width(size, frames)
        return bucket_for([(width // frames, height) for width, height in sizes], self.sizes)


def encode(
    policy: ImagePolicy,
    rows: Dataset,
    *,
    where: str,
    undecodable_images: str = "raise",
    cache: Path | None = None,
    buckets: bool = False,
    precision: str = "fp32",
    rows_digest: str | None = None,
    one_sided: bool = False,
    empty_prompt: bool = False,
    flipped: bool = False,
) -> EncodedPairs:
    """Encode decided pairs for a policy, or open them from the cache.

    Args:
        policy: the image generator, with its encoders.
        rows: decided rows of `image_preference`.
        where: name of the dataset, for errors.
        undecodable_images: "raise", or "drop" to skip such rows and list them in quarantine.jsonl in the cache folder.
        cache: folder of the cache, or None for the default.
        buckets: fit each pair to one of several sizes by its aspect ratio.
        precision: of the cached tensors, fp32, bf16 or fp16.
        rows_digest: `digest(rows)`, if it is known already.
        one_sided: encode one image per row, see `Pairs`.
        empty_prompt: also encode the empty prompt.
        flipped: also encode the mirrored images.

    Raises:
        ValueError: if an image does not decode, latents are not finite, or the disk is too small. It names dataset, row and fix.
    """
    if undecodable_images not in ("raise", "drop"):
        raise ValueError(f"undecodable_images {undecodable_images!r} is unknown; expected 'raise' or 'drop'")
    if precision not in arrow_shards.CACHE_DTYPES:
        raise ValueError(
            f"cache_precision {precision!r} is unknown; expected one of {', '.join(arrow_shards.CACHE_DTYPES)}"
        )
    unit = policy.patch * policy.pipe.vae_scale_factor
    sizes = tuple(buckets_of(policy.resolution, unit)) if buckets else ((policy.resolution, policy.resolution),)
    kinds = {"one side": one_sided, "empty prompt": empty_prompt, "flipped": flipped}
    variants = [name for name, wanted in kinds.items() if wanted]
    key = _key(policy, rows_digest or digest(rows), sizes, precision, variants)
    folder = (cache or cache_folder()) / "encoded" / key
    with_source = check_source_images(
        rows,
        where,
        pipeline=type(policy.pipe).__name__,
        is_image_editing=policy.is_image_editing,
        edits_optionally=policy.edits_optionally,
        takes_several_sources=policy.takes_several_sources,
    )
    if one_sided and with_source:
        check_equal_sources(rows, where)
    drops = undecodable_images == "drop"
    check_shown_sources(policy, where, drops=drops, empty_prompt=empty_prompt, flipped=flipped)
    pairs = Pairs(rows, where, undecodable_images, folder / QUARANTINE, with_source, one_sided)
    task = EncodingJob(policy, pairs, folder, sizes, precision, process_rank(), empty_prompt, flipped)
    if read_complete(folder) is None:
        if task.rank.is_first:
            (folder / COMPLETE).unlink(missing_ok=True)
        create_cache(folder)
        with stop_on_signal(lambda: saved_shards(folder)):
            _encode(task)
    return EncodedPairs(folder)


def _key(
    policy: ImagePolicy,
    rows_digest: str,
    sizes: Sequence[tuple[int, int]],
    precision: str,
    variants: Sequence[str] = (),
) -> str:
    content = [rows_digest, *variants] if variants else rows_digest
    parts = {"encoders": policy.fingerprint(), "rows": content, "sizes": sizes, "precision": precision}
    return content_key("encoded pairs", {**parts, "libraries": library_versions()})


def _encode(task: EncodingJob) -> None:
    """Encode the shards of this process. The first process then marks the cache complete."""
    names = task.prompts()
    expected = [task.folder / f"prompts-{number:05}" for number in range(len(_shards(len(names))))]
    expected += [task.folder / f"pairs-{number:05}" for number in range(len(_shards(len(task.pairs.rows))))]
    missing = sum(not path.exists() for path in expected) / len(expected)
    bytes_per_prompt, bytes_per_pair = sample_bytes(
        task.policy, task.precision, sides=len(task.sides), with_source=task.pairs.with_source, flipped=task.flipped
    )
    cache_bytes = bytes_per_prompt * len(names) + bytes_per_pair * len(task.pairs.rows)
    arrow_shards.check_disk(task.folder, int(cache_bytes * missing))
    title = f"encoding prompts, {arrow_shards.gib(bytes_per_prompt * len(names))}"
    with progress_bar(title, len(names)) as advance, task.policy.on_device("text encoders"):
        _encode_prompts(task, names, advance)
    rows = len(task.pairs.rows)
    title = f"encoding images, {arrow_shards.gib(bytes_per_pair * rows)}"
    with progress_bar(title, rows) as advance, task.policy.on_device("autoencoder"):
        _encode_pairs(task, names, advance)
    if task.rank.is_first:
        wait_for_files(expected, task.folder)
        _complete(task)
    wait_for_files([task.folder / COMPLETE], task.folder)


def sample_bytes(
    policy: ImagePolicy, precision: str, *, sides: int = 2, with_source: bool = False, flipped: bool = False
) -> tuple[int, int]:
    """Bytes on disk of one prompt and of one row (its sides, an image to edit, all mirrored too), measured by encoding one of each."""
    with policy.on_device("text encoders"):
        prompt = example_prompt(policy)
    with policy.on_device("autoencoder"):
        mean, std = policy.encode_images([example_image(policy)])
    source = with_source * arrow_shards.row_bytes({"mean": mean}, precision)
    row = source + sides * arrow_shards.row_bytes({"mean": mean, "std": std}, precision)
    return arrow_shards.row_bytes(prompt, precision), row * (1 + flipped)


def _complete(task: EncodingJob) -> None:
    pairs = list(arrow_shards.list_parts(task.folder, "pairs"))
    if not pairs:
        raise ValueError(
            f"{task.pairs.dataset_name}: no pair is left, because every row has an image that does not decode. See "
            f"{task.folder / QUARANTINE}"
        )
    complete = {"pairs": pairs, "prompts": list(arrow_shards.list_parts(task.folder, "prompts"))}
    about: dict[str, Any] = {
        "source": task.pairs.dataset_name,
        "model": task.policy.source,
        "precision": task.precision,
    }
    about |= {
        "rows": len(task.pairs.rows),
        "empty_prompt": task.empty_prompt,
        "truncated_prompts": truncated_prompts(task.policy, texts_of(task.pairs.rows)),
    }
    with atomic_write(task.folder / COMPLETE) as temporary:
        temporary.write_text(json.dumps(with_checksum({**about, **complete})), encoding="utf-8")


def _shards(total: int) -> list[range]:
    return [range(start, min(start + SHARD, total)) for start in range(0, total, SHARD)]


def _own(task: EncodingJob, kind: str, total: int) -> Iterator[tuple[Path, range]]:
    """Yield the shards of this process that do not exist yet."""
    parts = _shards(total)
    for number in task.rank.share(len(parts)):
        path = task.folder / f"{kind}-{number:05}"
        if not path.exists():
            yield path, parts[number]


def _encode_prompts(task: EncodingJob, names: Sequence[PromptKey], advance: Any) -> None:
    from dpo_mm.policies.diffusion.collate import stack_padded

    for path, part in _own(task, "prompts", len(names)):
        if task.policy.prompts_show_sources:
            encoded = [_encode_edit(task, names[n]) for n in part]
        else:
            first = task.policy.stored_prompts([names[part.start].text])
            tokens = max(value.shape[1] if value.ndim > 2 else 1 for value in first.values())
            images_per_batch = max(1, TOKENS // tokens)
            encoded = [
                task.policy.stored_prompts([names[n].text for n in part[start : start + images_per_batch]])
                for start in range(0, len(part), images_per_batch)
            ]
        columns = {name: stack_padded([row for each in encoded for row in each[name]]) for name in encoded[0]}
        arrow_shards.write_shard(
            path, {"all": arrow_shards.cast_columns(columns, task.precision, where=task.pairs.dataset_name)}
        )
        advance(len(part))


def _encode_edit(task: EncodingJob, key: PromptKey) -> dict[str, torch.Tensor]:
    """Encode a prompt with the images to edit of its row, fitted as the row's images are."""
    (row,) = task.pairs.decode(range(key.row, key.row + 1))
    with task.policy.at_size(task.size_of(row)):
        return task.policy.encode_edit(key.text, row["images"][len(task.sides) :])


def _encode_pairs(task: EncodingJob, names: Sequence[PromptKey], advance: Any) -> None:
    index = {name: n for n, name in enumerate(names)}
    optional = {} if task.pairs.one_sided else data_columns(task.pairs.rows)
    for path, part in _own(task, "pairs", len(task.pairs.rows)):
        groups: dict[tuple[tuple[int, int], int], list[dict[str, Any]]] = {}
        for row in task.pairs.decode(part):
            groups.setdefault((task.size_of(row), len(row["images"]) - len(task.sides)), []).append(row)
        sets = {}
        for (size, sources), group in sorted(groups.items()):
            columns = _columns(task, group, size, index, optional)
            name = f"{size[0]}x{size[1]}" + (f" {sources} sources" if sources > 1 else "")
            sets[name] = arrow_shards.cast_columns(columns, task.precision, where=task.pairs.dataset_name)
        arrow_shards.write_shard(path, sets)
        advance(len(part))


def images_per_batch(size: tuple[int, int]) -> int:
    """Number of images of this size that the autoencoder gets at a time."""
    return max(1, min(32, PIXELS // (size[0] * size[1])))


def _columns(
    task: EncodingJob,
    rows: Sequence[dict[str, Any]],
    size: tuple[int, int],
    index: dict[PromptKey, int],
    optional: dict[str, Any],
) -> dict[str, Any]:
    number_of = lambda text, row: index[key_of(task.policy, text, row["number"])]
    columns: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "prompt_row": [number_of(row["prompt"], row) for row in rows],
    }
    if has_captions(task.pairs.rows):
        texts = [(row[CAPTIONS] or [row["prompt"]], row) for row in rows]
        columns["caption_rows"] = [json.dumps([number_of(text, row) for text in each]) for each, row in texts]
    frames, sides = task.policy.frames, task.sides
    count = images_per_batch((size[0] * frames, size[1]))
    mirror = lambda image: clip_image([ImageOps.mirror(frame) for frame in clip_frames(image, frames)])
    sources = [source_name(number) for number in range(len(rows[0]["images"]) - len(sides))]
    if sources:
        check_source_proportions(rows, size, task.pairs.dataset_name, sides=len(sides))
    for position, side in enumerate((*sides, *sources)):
        images = [row["images"][position] for row in rows]
        with task.policy.at_size(size):
            conditions = task.policy.size_conditioning(images)
            for end in ("", FLIPPED)[: 1 + task.flipped]:
                variant = [mirror(image) for image in images] if end else images
                batches = [variant[i : i + count] for i in range(0, len(rows), count)]
                if side in sources:
                    columns[f"{side}_mean{end}"] = torch.cat([task.policy.encode_sources(batch) for batch in batches])
                else:
                    parts = [task.policy.encode_images(batch) for batch in batches]
                    columns[f"{side}_mean{end}"] = torch.cat([mean for mean, _ in parts])
                    columns[f"{side}_std{end}"] = torch.cat([std for _, std in parts])
                _refuse_non_finite(columns[f"{side}_mean{end}"], rows, side)
        if side not in sources:
            columns |= {f"{side}_{name}": value for name, value in conditions.items()}
    for name, values in optional.items():
        columns[name] = [values[row["number"]] for row in rows]
    return columns


def _refuse_non_finite(latents: torch.Tensor, rows: Sequence[dict[str, Any]], side: str) -> None:
    """Raise ValueError for latents that are not finite. A half-precision autoencoder that overflows gives them."""
    finite = latents.flatten(1).isfinite().all(1)
    if not finite.all():
        row = rows[int((~finite).nonzero()[0])]["id"]
        raise ValueError(
            f"row {row}: the latents of its {side} image are not finite numbers. The autoencoder overflows in half precision "
            "or has broken weights: train with precision fp32 or bf16"
        )


def encode_splits(
    policy: ImagePolicy | TextPolicy,
    config: TrainConfig,
    recorded: Sequence[Mapping[str, Any]] = (),
    *,
    loaded: TrainingRows | None = None,
) -> EncodedSplits:
    """Encode the training rows of a config, and evaluation rows of other prompts.

    Text is encoded in memory or in each step, see `response_rows`. Images go through the cache.

    Args:
        policy: the model.
        config: settings of the run.
        recorded: `dropped_rows` of the checkpoint that the run continues.
        loaded: the rows, if they are loaded already.

    Raises:
        ValueError: as `encode`.
    """
    loaded = loaded or load_training_rows(config, modality=policy.modality)
    if policy.modality == "text":
        return encode_responses(policy, config, cache_folder(), recorded, loaded=loaded)
    how: dict[str, Any] = {
        "where": config.pairs,
        "undecodable_images": config.undecodable_images,
        "buckets": config.buckets,
        "precision": config.cache_precision,
        "one_sided": loaded.one_sided,
        "empty_prompt": config.proportion_empty_prompts > 0,
        "flipped": config.random_flip,
    }
    splits = [part for part in (loaded.train, loaded.evaluation) if part is not None]
    digests = split_digests(splits)
    encoded: list[Any] = []
    for part, key in zip(splits, digests, strict=True):
        if loaded.kind == "liked":
            kinds = enumerate(liked_and_disliked(part))
            encoded.append(CoupledRows(*(encode(policy, rows, **how, rows_digest=f"{key} {n}") for n, rows in kinds)))
        else:
            encoded.append(encode(policy, part, **how, rows_digest=key))
    return EncodedSplits(encoded[0], encoded[1] if len(encoded) > 1 else None, content_hash(digests))
