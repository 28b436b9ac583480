"""What a comparison draws, drawn once and judged once: plans, pictures, and all that decides a picture's pixels."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpo_mm import __version__
from dpo_mm.config import CompareConfig
from dpo_mm.data.prompts import category, read_prompt_set, seeds_of
from dpo_mm.evaluation.image_statistics import ImageStatistics, image_statistics
from dpo_mm.evaluation.image_store import ImageStore, Pictures
from dpo_mm.judges import judge_card, load_judge
from dpo_mm.policies.protocol import ImagePolicy
from dpo_mm.progress import progress_bar

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
AT_ONCE = 64
"""Pictures that a judge is given at once; what it says of them is kept before the next are."""


@dataclass(frozen=True)
class SamplingPlan:
    """What is drawn: prompts and seeds, each picture's own, (prompts x samples,) with a prompt's samples together.

    categories: of each picture; empty: those that the world of shapes knows. balanced: scores are means of the
    categories' means, as GenEval's is.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: int
    categories: tuple[str, ...] = ()
    balanced: bool = False

    @cached_property
    def kinds(self) -> np.ndarray:
        """The category of each picture, (pictures,)."""
        return np.array(self.categories or [category(prompt) for prompt in self.prompts])

    @property
    def weights(self) -> np.ndarray | None:
        """Of each picture in a mean, (pictures,), so that categories count alike; None where pictures do."""
        if not self.balanced:
            return None
        _, place, count = np.unique(self.kinds, return_inverse=True, return_counts=True)
        return 1 / count[place]

    def first(self, samples: int) -> SamplingPlan:
        """The same with fewer samples a prompt."""
        keep = [n for n in range(len(self.prompts)) if n % self.samples < samples]
        return SamplingPlan(
            tuple(self.prompts[n] for n in keep),
            tuple(self.seeds[n] for n in keep),
            min(samples, self.samples),
            tuple(self.categories[n] for n in keep) if self.categories else (),
            self.balanced,
        )


@dataclass(frozen=True)
class ScoredImages:
    """Pictures of a plan and their scores by judge, (pictures,)."""

    plan: SamplingPlan
    images: Sequence[Image.Image]
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def looks(self) -> ImageStatistics:
        return image_statistics(self.images)

    def first(self, samples: int) -> ScoredImages:
        """The same with fewer samples a prompt."""
        keep = [n for n in range(len(self.plan.prompts)) if n % self.plan.samples < samples]
        scores = {judge: values[keep] for judge, values in self.scores.items()}
        images = self.images
        some = Pictures([images.files[n] for n in keep]) if isinstance(images, Pictures) else [images[n] for n in keep]
        return ScoredImages(self.plan.first(samples), some, scores)


def sampling_plan(config: CompareConfig) -> SamplingPlan:
    """The prompts and seeds of a config. Raises ValueError where prompts or samples won't do."""
    if config.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt is {config.images_per_prompt}; expected at least 1 picture a prompt")
    found = read_prompt_set(config.prompts, limit=config.max_prompts)
    prompts = [prompt for prompt in found.prompts for _ in range(config.images_per_prompt)]
    seeds = [seed for one in found.prompts for seed in seeds_of(one.text, config.images_per_prompt, seed=config.seed)]
    texts, kinds = zip(*prompts, strict=True)
    return SamplingPlan(texts, tuple(seeds), config.images_per_prompt, kinds, found.balanced)


@dataclass(frozen=True)
class ImageSampler:
    """A policy that draws for a comparison, with the adapter that is attached to it, and the gallery that keeps it all."""

    policy: ImagePolicy
    config: CompareConfig
    gallery: ImageStore
    adapter: str | None = None

    def generate(self, plan: SamplingPlan, *, scale: float, label: str) -> ScoredImages:
        """The plan's pictures at a LoRA scale (0: the base), judged; those that the gallery has are not drawn again.

        label: what they are drawn for, the gallery's subfolder.
        """
        how, gallery = self.sampling(scale), self.gallery
        wanted = list(zip(plan.prompts, plan.seeds, strict=True))
        left = [pair for pair in dict.fromkeys(wanted) if gallery.find(how, *pair) is None]
        with progress_bar(f"drawing: {label}", len(wanted)) as advance:
            advance(len(wanted) - len(left))
            for drawn in self._batches(left, scale):
                gallery.add(how, drawn, label=label)
                advance(len(drawn))
        rows = [gallery.rows[gallery.key(how, *pair)] for pair in wanted]
        pictures = Pictures([gallery.folder / row["file"] for row in rows])
        digests = [row["sha256"] for row in rows]
        scores = {name: score_images(name, pictures, digests, plan.prompts, gallery) for name in self.config.judges}
        return ScoredImages(plan, pictures, scores)

    def _batches(self, pairs: Sequence[tuple[str, int]], scale: float) -> Iterator[list[tuple[str, int, Image.Image]]]:
        left, config = iter(pairs), self.config
        for images in self.policy.sample(
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            batch_size=config.batch_size,
            scale=scale,
        ):
            yield [(*next(left), image) for image in images]

    def sampling(self, scale: float) -> dict[str, Any]:
        """All that decides a picture beside its prompt and seed, as plain values; names of models beside their hash."""
        policy, config = self.policy, self.config
        options = json.dumps(dict(policy.scheduler.config), sort_keys=True, default=str)
        return {
            "model": config.model,
            "revision": config.revision,
            "adapter": self.adapter if scale else None,
            "weights": self._tuned_digest if scale else self._base_digest,
            "scale": scale,
            "scheduler": f"{type(policy.scheduler).__name__} {hashlib.sha256(options.encode()).hexdigest()[:12]}",
            "steps": config.num_inference_steps,
            "guidance": config.guidance_scale,
            "size": policy.resolution,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else policy.device.type,
            "versions": {"dpo_mm": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES},
        }

    @cached_property
    def _tuned_digest(self) -> str:
        return weights_digest(self.policy, self.policy.model)

    @cached_property
    def _base_digest(self) -> str:
        base = self.policy.base_denoiser
        return weights_digest(self.policy, self.policy.model if base is None else base, adapter=False)


def weights_digest(policy: ImagePolicy, denoiser: Any, *, adapter: bool = True) -> str:
    """A hash of all weights that a picture comes from, with or without what an adapter adds."""
    digest = hashlib.sha256(policy.fingerprint().encode())
    for name, tensor in sorted(denoiser.state_dict().items()):
        if adapter or "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def score_images(
    name: str, pictures: Pictures, digests: Sequence[str], prompts: Sequence[str], gallery: ImageStore
) -> np.ndarray:
    """What a judge says of each picture, (pictures,), asked of those that it has not judged before.

    Raises ValueError where it gives another number of scores, or one that is no number.
    """
    card, score = card_of(name), load_judge(name)
    left = [n for n, of in enumerate(zip(digests, prompts, strict=True)) if gallery.score(card, *of) is None]
    for start in range(0, len(left), AT_ONCE):
        part = left[start : start + AT_ONCE]
        asked = [prompts[n] for n in part]
        found = [float(value) for value in score([pictures[n] for n in part], asked)]
        if len(found) != len(part):
            raise ValueError(f"judge {name!r} gave {len(found)} scores for {len(part)} pictures; expected one each")
        wrong = next((n for n, value in enumerate(found) if not math.isfinite(value)), None)
        if wrong is not None:
            raise ValueError(f"judge {name!r} says {found[wrong]} of a picture of {asked[wrong]!r}; expected a number")
        gallery.note(
            name, card, [(digests[n], *said) for n, said in zip(part, zip(asked, found, strict=True), strict=True)]
        )
    return np.array([gallery.score(card, *of) for of in zip(digests, prompts, strict=True)], dtype=np.float64)


def card_of(name: str) -> str:
    """A hash of a judge's card: another model, formula or code is another judge."""
    return hashlib.sha256(json.dumps(judge_card(name), sort_keys=True, default=str).encode()).hexdigest()[:16]
