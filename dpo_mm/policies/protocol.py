"""The policy interface: `Policy` is what training uses, `ImagePolicy` and `TextPolicy` add encoding and generation.

`DiffusionPolicy` implements `ImagePolicy` and `VisionLanguage` implements `TextPolicy`. The rest of the package uses no
other member of them, which mypy checks. A new model family subclasses one of the two and adds a row to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import Response
from dpo_mm.objectives import LogProbs

Modality = Literal["image", "text"]
Batch = dict[str, Any]
"""A batch from the policy's own collator. Only the policy reads it, except `id` and the columns of DATASET_INPUTS."""


class Policy(Protocol):
    """A model that preferences train."""

    @property
    def modality(self) -> Modality:
        """What the model generates. Log-probs of text are likelihoods, those of images the denoising surrogate."""
        ...

    @property
    def model(self) -> nn.Module:
        """The module that trains: the whole denoiser or language model, with its adapter if it has one."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        ...

    def prepare(self, config: TrainConfig) -> None:
        """Freeze everything, then add a LoRA or make all weights trainable. Raises ValueError for another tuning."""
        ...

    def fingerprint(self) -> str:
        """Hash everything that decides how a row is encoded."""
        ...

    def free_encoders(self) -> None:
        """Release the modules that only encoding needs."""
        ...

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Make a batch from encoded rows, each with its `visit`: the epoch, which seeds the row's noise."""
        ...

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """Log-probs of chosen and rejected under the current weights. `model` may be wrapped (DDP, FSDP)."""
        ...

    def log_probs_and_gradient_scale(self, model: nn.Module, batch: Batch, *, slack: float) -> tuple[LogProbs, Tensor]:
        """`log_probs`, and `sdpo`'s scale of the rejected gradient, (pairs,), both from one forward."""
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Context manager that disables the adapter. Raises ValueError if there is none."""
        ...

    def frozen_copy(self) -> nn.Module:
        """A copy of the current model that never trains."""
        ...

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the trained weights in the format that diffusers or transformers load.

        Args:
            folder: an existing folder.
            weights: the gathered state, if the model's own is sharded over several processes.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Load what `save` wrote into the prepared model. Raises ValueError if it does not fit."""
        ...

    def load_adapter(self, folder: str | Path) -> None:
        """Load a trained adapter or model for generation. Raises ValueError if the folder has none."""
        ...

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Lines of the run's summary: family, target, reduction, effective beta."""
        ...


class ImagePolicy(Policy, Protocol):
    """An image generator."""

    @property
    def modality(self) -> Literal["image"]: ...

    pipe: Any
    """The diffusers pipeline."""
    source: str
    """The folder or hub id that the pipeline came from."""
    scheduler: Any
    dtype: torch.dtype
    resolution: int
    """Pixels per edge of a square image."""
    patch: int
    """Latent pixels per edge of one token of the denoiser."""
    is_image_editing: bool
    """Whether the prompt contains an image to edit."""
    base_denoiser: nn.Module | None
    """The base denoiser, if `load_adapter` replaced it."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompt embeddings, each tensor with the prompts first, on the CPU."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (images, channels, height, width) each, float32, on the CPU."""
        ...

    def at_size(self, size: tuple[int, int]) -> AbstractContextManager[None]:
        """Context manager that fits images to this (width, height) instead of a square."""
        ...

    def size_conditioning(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Columns that describe each image's size, (images, ...) each, on the CPU. Empty for most families."""
        ...

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        batch_size: int,
        scale: float = 1.0,
        sources: Sequence[Image.Image] | None = None,
    ) -> Iterator[list[Image.Image]]:
        """Generate one image per prompt and seed, a batch at a time.

        Args:
            prompts, seeds: of equal length. An image depends on its own seed only, not on its batch.
            steps: denoising steps.
            guidance: guidance scale.
            batch_size: images per forward.
            scale: weight of the loaded adapter. 0 is the base model.
            sources: the image to edit per prompt, for image-editing families.

        Raises:
            ValueError: if sources are missing or not supported, or the scale is not.
        """
        ...

    def usage_snippet(self, base: str, folder: str) -> list[str]:
        """Lines of Python that load the trained weights with diffusers, for the model card."""
        ...


class TextPolicy(Policy, Protocol):
    """A vision-language model, or a language model without images."""

    @property
    def modality(self) -> Literal["text"]: ...

    ld_alpha: float
    edited_token_weight: float

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        """Encode response pairs as token ids and image tensors. Raises ValueError as the processor does."""
        ...

    def cache_vision_features(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replace pixels by features of the frozen vision tower. Raises ValueError if the tower trains."""
        ...

    def base_weights(self) -> AbstractContextManager[None]:
        """Context manager in which the policy generates as before `load_adapter`."""
        ...

    def generate(
        self,
        images: Sequence[Sequence[Any]],
        messages: Sequence[Any],
        *,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[Response]:
        """Generate one response per conversation. `seed` and the batch's position decide the sampling."""
        ...
