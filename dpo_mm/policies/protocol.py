"""The policy interface: training uses `Policy`, and `ImagePolicy` and `TextPolicy` add encoding and generation.

`DiffusionPolicy` implements `ImagePolicy` and `VisionLanguage` implements `TextPolicy`. The rest of the package uses no
other member of them, which mypy checks. A new model family subclasses one of the two and adds a row to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import Response
from dpo_mm.objectives import LogProbs

if TYPE_CHECKING:
    from dpo_mm.policies.adapters import SavedLora
    from dpo_mm.policies.vlm.decoding import Decoding
    from dpo_mm.policies.vlm.row_sizes import RowSize

Modality = Literal["image", "text"]
Batch = dict[str, Any]
"""A batch from the policy's `collate`. Only the policy reads it, except `id` and the columns of DATASET_INPUTS."""


class Policy(Protocol):
    """A model that is trained on preferences."""

    @property
    def modality(self) -> Modality:
        """Kind of data that the model generates.

        Log-probs of text are likelihoods, those of images the denoising surrogate.
        """
        ...

    @property
    def model(self) -> nn.Module:
        """Module that is trained: the whole denoiser or language model, with its adapter if it has one."""
        ...

    @property
    def with_encoders(self) -> nn.Module | None:
        """`model` together with the text encoders that train too. None if there are none."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        ...

    def prepare(self, config: TrainConfig) -> None:
        """Freeze everything, then add a LoRA or make all weights trainable.

        Args:
            config: settings of the run. `tuning` is "lora" or "full".

        Raises:
            ValueError: if `tuning` is unknown, or `lora_targets` match no module.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that determines how a row is encoded."""
        ...

    def free_encoders(self) -> None:
        """Release the modules that only encoding needs, if there are any."""
        ...

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Make a batch from encoded rows.

        Args:
            rows: encoded rows, each with its `visit`: the row's epoch, which seeds its noise.
        """
        ...

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """Compute the log-probs of chosen and rejected under the current weights.

        Args:
            model: `self.model` or a copy of it, possibly wrapped (DDP, FSDP).
            batch: from `collate`, on the model's device.

        Returns:
            Log-probs in float32, (pairs,) each, with gradient if it is enabled.
        """
        ...

    def log_probs_and_gradient_scale(self, model: nn.Module, batch: Batch, *, slack: float) -> tuple[LogProbs, Tensor]:
        """Compute `log_probs` and `sdpo`'s scale of the rejected gradient in one forward pass.

        Args:
            model: as in `log_probs`.
            batch: as in `log_probs`.
            slack: the paper's mu, in [0, 1).

        Returns:
            The log-probs, and the scale per pair, (pairs,), in [0, 1], without gradient.
        """
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Context manager in which the model is the one before the first step.

        The adapter is off, or is a frozen copy of the adapter from which the run starts.

        Raises:
            ValueError: if there is no adapter.
        """
        ...

    def frozen_copy(self) -> nn.Module:
        """Return a copy of the current model that is never trained."""
        ...

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the trained weights in the format that diffusers or transformers load.

        Args:
            folder: an existing folder.
            weights: the gathered state, if the model's own is sharded over several processes.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Load the weights that `save` wrote into the prepared model.

        Raises:
            ValueError: if the weights do not fit the model.
        """
        ...

    def load_adapter(self, folder: str | Path) -> None:
        """Load a trained adapter or model for generation.

        Raises:
            ValueError: if the folder contains neither, or its weights do not fit.
        """
        ...

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Return lines of the run's summary, such as family, target, reduction and effective beta."""
        ...


class ImagePolicy(Policy, Protocol):
    """An image generator."""

    @property
    def modality(self) -> Literal["image"]:
        """Always "image"."""
        ...

    pipe: Any
    """The diffusers pipeline."""
    source: str
    """Folder or hub id of the pipeline."""
    scheduler: Any
    """The pipeline's scheduler."""
    dtype: torch.dtype
    """Type of the denoiser's inputs."""
    resolution: int
    """Pixels per edge of a square image."""
    patch: int
    """Latent pixels per edge of one token of the denoiser."""
    frames: int
    """Frames of a clip, which is an image with its frames side by side. 1 for images."""
    is_image_editing: bool
    """True if the prompt contains an image to edit."""
    edits_optionally: bool
    """True if the prompts of a dataset or list may have an image to edit: all of them, or none."""
    takes_several_sources: bool
    """True if a prompt may contain several images to edit."""
    prompts_show_sources: bool
    """True if the text encoder sees the images to edit. Prompts are then encoded by `encode_edit`."""
    base_pipe: Any
    """The base pipeline, if `load_adapter` loaded a whole denoiser or pipeline. None otherwise."""
    encoder_loras: dict[str, SavedLora]
    """LoRAs of text encoders by name, which a start adapter has and the result keeps."""

    text_encoders: ClassVar[tuple[str, ...]]
    """Text encoders that can be trained with the denoiser, by their names in the pipeline."""
    trained_encoders: tuple[str, ...]
    """Those of them that train. Set it before prompts are encoded, see `text_encoder_lora`."""

    def stored_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts for all steps of a run: as embeddings, or as tokens if the text encoders train."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Compute the prompt embeddings: tensors by name, prompts first, on the CPU."""
        ...

    def encode_edit(self, prompt: str, sources: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Compute the embeddings of one prompt with its images to edit: tensors by name, (1, ...), on the CPU."""
        ...

    def encode_sources(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images to edit as the pipeline does, (images, channels, h, w), float32, on the CPU."""
        ...

    def on_device(self, encoders: Literal["text encoders", "autoencoder"]) -> AbstractContextManager[None]:
        """Context manager in which these encoders are on the device, if components are moved there one at a time."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Encode images with the autoencoder.

        Returns:
            Mean and standard deviation of the latents, (images, channels, height, width) each, float32, on the CPU.
        """
        ...

    def at_size(self, size: tuple[int, int]) -> AbstractContextManager[None]:
        """Context manager in which images are resized to this (width, height) in pixels instead of a square."""
        ...

    def size_conditioning(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Compute columns that describe each image's size, (images, ...) each, on the CPU. Empty for most families."""
        ...

    def at_scale(self, scale: float) -> AbstractContextManager[None]:
        """Context manager that sets the weight of what `load_adapter` loaded, in all models of the pipeline.

        Args:
            scale: 0 is the base. A whole denoiser or pipeline supports only 0 and 1.

        Raises:
            ValueError: if the scale is not supported.
        """
        ...

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Return the pipeline's keyword arguments to generate one image per prompt."""
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
        sources: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Iterator[list[Image.Image]]:
        """Generate one image per prompt and seed, a batch at a time.

        Args:
            prompts: text per image.
            seeds: seed per image, as many as prompts. The noise of an image depends only on its own seed, not on its
                batch.
            steps: number of denoising steps.
            guidance: guidance scale.
            batch_size: images per forward pass.
            scale: weight of the loaded adapter. 0 is the base model.
            sources: the images to edit per prompt, for image-editing families.

        Yields:
            The images of one batch.

        Raises:
            ValueError: if sources are missing or not supported, or the scale is not supported.
        """
        ...

    def usage_snippet(self, base: str, folder: str) -> list[str]:
        """Return lines of Python that load the trained weights with diffusers, for the model card.

        Args:
            base: folder or hub id of the base model.
            folder: folder or hub id of the trained weights.
        """
        ...


class TextPolicy(Policy, Protocol):
    """A vision-language model, or a language model without images."""

    @property
    def modality(self) -> Literal["text"]:
        """Always "text"."""
        ...

    ld_alpha: float
    """Weight of tokens past the shorter response's length, see `shared_length`. 1 is the plain sum."""
    edited_token_weight: float
    """Weight of tokens in which the responses differ, see `segment_mean`. 1 is the plain sum."""

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        """Encode response pairs as token ids and image tensors.

        Args:
            rows: rows of the schema `response_preference`.

        Raises:
            ValueError: if a row is too long, or its images, prompt or responses do not fit together.
        """
        ...

    def encoding_fingerprint(self) -> str:
        """Return a hash of everything that determines the tokens and pixels of a row. It reads no weights."""
        ...

    def row_measure(self) -> Callable[[Mapping[str, Any]], RowSize | None]:
        """Return a function that counts a row's tokens without decoding its images.

        It returns the number of tokens and a digest of the texts' tokens, or None for a row that is dropped because it is
        too long. It raises ValueError as `encode` does.
        """
        ...

    def cache_vision_features(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replace the pixels of encoded rows by features of the frozen vision tower, on the CPU.

        Raises:
            ValueError: if the tower is trained, or its features cannot be computed separately.
        """
        ...

    def base_weights(self) -> AbstractContextManager[None]:
        """Context manager in which the policy has the weights from before `load_adapter`."""
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
        loop_references: Sequence[str] | None = None,
    ) -> list[Response]:
        """Generate one response per conversation.

        Args:
            images: images per conversation.
            messages: text, message or list of messages per conversation.
            max_new_tokens: largest number of tokens per response.
            do_sample: False takes the most likely token each time.
            temperature: temperature of the sampling, > 0.
            seed: seed of the first batch. A later batch adds the index of its first conversation.
            batch_size: conversations per batch.
            loop_references: a text per conversation. A response whose repetition loop is much longer than any repetition
                in its text is stopped, with `hit_limit` set, see `loop_stop`. None stops no response.

        Returns:
            One response per conversation, in the same order.
        """
        ...

    def generate_each(
        self,
        images: Sequence[Sequence[Any]],
        messages: Sequence[Any],
        decodings: Sequence[Decoding],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        loop_references: Sequence[str] | None = None,
    ) -> list[list[Response]]:
        """Generate one response per decoding and conversation. Images and prompts run once for all decodings.

        Other arguments are those of `generate`.

        Args:
            decodings: how each response is decoded. Their seeds are those of `generate`.

        Returns:
            For each decoding, what `generate` returns.
        """
        ...
