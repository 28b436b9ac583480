"""Image generation of a comparison: each image is generated and scored once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dpo_mm.config import CompareConfig
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.prompts import NO_SOURCES, category, item_name, read_prompt_set, seeds_of
from dpo_mm.evaluation.image_statistics import ImageStatistics, image_statistics
from dpo_mm.evaluation.image_store import NAMES, ImageFiles, ImageStore
from dpo_mm.files.content_key import check_ingredients, content_hash, library_versions, lora_scales, plain_settings
from dpo_mm.judges import judge_digests
from dpo_mm.judges.score_checks import image_scores
from dpo_mm.policies.diffusion.prompt_sources import images_to_edit
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.process_rank import process_rank

JUDGE_BATCH_SIZE = 64
"""Images per call of a judge. Its scores are saved before the next call."""


class ImageRequest(NamedTuple):
    """An image to generate: prompt, seed, and the images to edit."""

    prompt: str
    seed: int
    sources: LazyImages = NO_SOURCES

    @property
    def content(self) -> tuple[Any, ...]:
        """Fields for cache keys: images to edit are their hashes."""
        return (self.prompt, self.seed, *self.sources.file_hashes)

    @property
    def recorded(self) -> dict[str, list[str]]:
        """Entry of the image's row in the manifest that names the images to edit."""
        return {"sources": list(self.sources.file_hashes)} if self.sources else {}


@dataclass(frozen=True)
class SamplingPlan:
    """Prompt and seed of each image, with a prompt's images together.

    Args:
        prompts, seeds: of each image, (prompts x samples,).
        samples: images per prompt.
        categories: of each image. Empty: derived from the prompts of the synthetic shapes.
        balanced: whether scores are means over the categories' means, as GenEval's are.
        sources: images to edit, of each image. Empty: the prompts have none.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: int
    categories: tuple[str, ...] = ()
    balanced: bool = False
    sources: tuple[LazyImages, ...] = ()

    @property
    def requests(self) -> list[ImageRequest]:
        """The images to generate."""
        each = zip(self.prompts, self.seeds, self.sources or repeat(NO_SOURCES, len(self.prompts)), strict=True)
        return [ImageRequest(*request) for request in each]

    @cached_property
    def items(self) -> np.ndarray:
        """Name of each image's prompt together with its images to edit, (images,): what an interval is clustered by."""
        return np.array([item_name(request.prompt, request.sources) for request in self.requests])

    @cached_property
    def category_per_image(self) -> np.ndarray:
        """Category of each image, (images,)."""
        return np.array(self.categories or [category(prompt) for prompt in self.prompts])

    @property
    def weights(self) -> np.ndarray | None:
        """Weight of each image in a mean, (images,), if categories count equally. None if images do."""
        if not self.balanced:
            return None
        _, index, count = np.unique(self.category_per_image, return_inverse=True, return_counts=True)
        return 1 / count[index]

    def first(self, samples: int) -> SamplingPlan:
        """Return the plan with only the first `samples` images per prompt."""
        indices = self.first_indices(samples)
        return SamplingPlan(
            tuple(self.prompts[n] for n in indices),
            tuple(self.seeds[n] for n in indices),
            min(samples, self.samples),
            tuple(self.categories[n] for n in indices) if self.categories else (),
            self.balanced,
            tuple(self.sources[n] for n in indices) if self.sources else (),
        )

    def first_indices(self, samples: int) -> list[int]:
        """Return the indices of the first `samples` images of each prompt."""
        return [n for n in range(len(self.prompts)) if n % self.samples < samples]


@dataclass(frozen=True)
class ScoredImages:
    """Images of a plan and their scores.

    Args:
        plan: how many, and of which prompts.
        images: the images, (images,).
        scores: by judge, (images,) each.
        frames: frames of a clip, 1 for images.
    """

    plan: SamplingPlan
    images: Sequence[Image.Image]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    frames: int = 1

    @cached_property
    def image_statistics(self) -> ImageStatistics:
        """Statistics of the images, computed at first access."""
        return image_statistics(self.images)

    def first(self, samples: int) -> ScoredImages:
        """Return only the first `samples` images per prompt."""
        indices, images = self.plan.first_indices(samples), self.images
        scores = {judge: values[indices] for judge, values in self.scores.items()}
        if isinstance(images, ImageFiles):
            images = ImageFiles([images.files[n] for n in indices])
        else:
            images = [images[n] for n in indices]
        return ScoredImages(self.plan.first(samples), images, scores, self.frames)


def sampling_plan(config: CompareConfig) -> SamplingPlan:
    """Build the plan of a config.

    Raises:
        ValueError: if the prompts cannot be read or images_per_prompt is below 1.
    """
    if config.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt is {config.images_per_prompt}. Use at least 1.")
    prompt_set = read_prompt_set(config.prompts, limit=config.max_prompts)
    prompts = [prompt for prompt in prompt_set.prompts for _ in range(config.images_per_prompt)]
    seeds = [
        seed
        for prompt in prompt_set.prompts
        for seed in seeds_of(
            prompt.text, config.images_per_prompt, seed=config.seed, sources=prompt.sources.file_hashes
        )
    ]
    texts, categories, sources = zip(*prompts, strict=True)
    samples, own = config.images_per_prompt, sources if any(sources) else ()
    return SamplingPlan(texts, tuple(seeds), samples, categories, prompt_set.balanced, own)


@dataclass(frozen=True)
class ImageSampler:
    """Image generation with one policy, saved in a store.

    Args:
        policy: the model, with its adapter attached.
        config: steps, guidance, batch size and judges.
        store: images and scores on disk.
        adapter: name of the adapter in the manifest.
    """

    policy: ImagePolicy
    config: CompareConfig
    store: ImageStore
    adapter: str | None = None

    def generate(
        self, plan: SamplingPlan, *, scale: float, label: str, judges: Sequence[str] | None = None
    ) -> ScoredImages:
        """Generate and score the plan's images. Images that are in the store are not generated again.

        Several processes share batches and scores, and each returns all of them.

        Args:
            plan: prompts and seeds.
            scale: LoRA scale. 0 is the base.
            label: subfolder of the store.
            judges: names of the judges. None: those of the config.
        """
        store, size = self.store, self.config.batch_size
        distinct = list({request.content: request for request in plan.requests}.values())
        batches = [distinct[start : start + size] for start in range(0, len(distinct), size)]
        identities = self._identities(batches, scale)
        share = process_rank().share(len(batches))
        for sources in {request.sources.file_hashes: request.sources for request in distinct}.values():
            store.add_sources(sources)
        with progress_bar(f"generating images: {label}", sum(len(batches[number]) for number in share)) as advance:
            for number in share:
                missing = [store.find(*identity) is None for identity in identities[number]]
                if any(missing):
                    images = self._generate_batch(batches[number], scale)
                    for (own, prompt, seed), image, is_missing in zip(identities[number], images, missing, strict=True):
                        if is_missing:
                            store.add(own, [(prompt, seed, image)], label=label)
                advance(len(batches[number]))
        keys = {
            request.content: store.key(*identity)
            for batch, own_identities in zip(batches, identities, strict=True)
            for request, identity in zip(batch, own_identities, strict=True)
        }
        store.wait_for(lambda: next((f"an image of {label}" for key in keys.values() if key not in store.rows), None))
        rows = [store.rows[keys[request.content]] for request in plan.requests]
        files = ImageFiles([store.folder / row["file"] for row in rows])
        digests = [row["sha256"] for row in rows]
        names = self.config.judges if judges is None else judges
        scores = {name: score_images(name, files, digests, plan.requests, store) for name in names}
        return ScoredImages(plan, files, scores, self.policy.frames)

    def _identities(
        self, batches: Sequence[Sequence[ImageRequest]], scale: float
    ) -> list[list[tuple[dict[str, Any], str, int]]]:
        """Return settings, prompt and seed of each image of each batch, by which the store knows it."""
        settings, identities = self.settings(scale), []
        for batch in batches:
            own = {**settings, "batch": content_hash([request.content for request in batch])}
            check_ingredients("image of a comparison", {k: v for k, v in own.items() if k not in NAMES})
            own |= {"frames": self.policy.frames} if self.policy.frames > 1 else {}
            identities.append([({**own, **request.recorded}, request.prompt, request.seed) for request in batch])
        return identities

    def _generate_batch(self, batch: Sequence[ImageRequest], scale: float) -> list[Image.Image]:
        """Generate the images of one batch.

        A batch is generated as a whole even if only one image is missing: its size changes the rounding of the pixels.
        """
        config = self.config
        parts = self.policy.sample(
            [request.prompt for request in batch],
            [request.seed for request in batch],
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            batch_size=config.batch_size,
            scale=scale,
            **images_to_edit([request.sources for request in batch]),
        )
        return [image for part in parts for image in part]

    def settings(self, scale: float) -> dict[str, Any]:
        """Return everything but prompt, seed and batch that determines an image at a LoRA scale, as plain values."""
        policy, config = self.policy, self.config
        with policy.at_scale(scale):
            scheduler = policy.pipe.scheduler
            weights = self._tuned_digest if scale else self._base_digest
        options = json.dumps(dict(scheduler.config), sort_keys=True, default=str)
        decisive = {
            "weights": weights,
            "scale": scale,
            "scheduler": f"{type(scheduler).__name__} {hashlib.sha256(options.encode()).hexdigest()[:12]}",
            "steps": config.num_inference_steps,
            "guidance": config.guidance_scale,
            "size": policy.resolution,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type,
            "libraries": library_versions(),
        }
        names = {"model": config.model, "revision": config.revision, "adapter": self.adapter if scale else None}
        return {**names, **decisive}

    @cached_property
    def _tuned_digest(self) -> str:
        return weights_digest(self.policy.pipe)

    @cached_property
    def _base_digest(self) -> str:
        return weights_digest(self.policy.pipe, adapter=False)


def weights_digest(pipe: Any, *, adapter: bool = True) -> str:
    """Hash all weights and configurations that determine an image, with or without those of the LoRAs.

    The scheduler is not among them.
    """
    parts: dict[str, Any] = {"settings": plain_settings(dict(pipe.config))}
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            weights = {
                name.replace(".base_layer", ""): tensor
                for name, tensor in component.state_dict().items()
                if adapter or "lora_" not in name
            }
            config: Any = component.config
            settings = plain_settings(config.to_dict() if hasattr(config, "to_dict") else dict(config))
            parts[part] = [type(component).__name__, weights, settings, lora_scales(component) if adapter else {}]
        elif part != "scheduler":
            parts[part] = component
    return content_hash(parts)


def score_images(
    name: str, files: ImageFiles, digests: Sequence[str], requests: Sequence[ImageRequest], store: ImageStore
) -> np.ndarray:
    """Score images with a judge, except those that the store has its scores of. Several processes share the work.

    Args:
        name: the judge.
        files, digests, requests: image, hash and what was generated, (images,) each.
        store: scores on disk. New ones are added.

    Returns:
        Scores, (images,).

    Raises:
        ValueError: if the judge returns another number of scores, or a score that is not finite.
    """
    card = judge_card_digest(name)
    keys = [
        (digest, request.prompt, *request.sources.file_hashes)
        for digest, request in zip(digests, requests, strict=True)
    ]
    share = process_rank().share(-(-len(keys) // JUDGE_BATCH_SIZE))
    missing = [n for n, key in enumerate(keys) if n // JUDGE_BATCH_SIZE in share and store.score(card, *key) is None]
    for start in range(0, len(missing), JUDGE_BATCH_SIZE):
        part = missing[start : start + JUDGE_BATCH_SIZE]
        prompts, sources = [requests[n].prompt for n in part], [requests[n].sources for n in part]
        scores = image_scores(name, [files[n] for n in part], prompts, sources).tolist()
        store.add_scores(name, card, [(*keys[n], score) for n, score in zip(part, scores, strict=True)])
    store.wait_for(lambda: next((f"a score of {name}" for key in keys if store.score(card, *key) is None), None))
    return np.array([store.score(card, *key) for key in keys], dtype=np.float64)


def judge_card_digest(name: str) -> str:
    """Hash a judge's card, see `judge_digests`."""
    return judge_digests([name])[name]
