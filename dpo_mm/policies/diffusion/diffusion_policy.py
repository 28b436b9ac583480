"""Image generators as a policy: the log-prob of an image is -1/2 of its denoising error.

    log p(x) = -1/2 * mean over latent elements of (prediction - target)^2

Noise and timestep come with the batch. They are the same for chosen and rejected, and for policy and reference. The
noise process and the target are those of the pipeline's scheduler, see `noise_process`. Source: Wallace et al. 2023
(2311.12908), eq. 14. A family is a subclass, as `dpo_mm/policies/README.md` describes.

Errors are computed in float32 after the network. At beta 5000, half-precision errors would add noise with a standard
deviation of 0.2 to 0.9 to the logit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import to_rgb
from dpo_mm.files.content_key import content_hash, plain_settings
from dpo_mm.models.model_loading import load_pipeline
from dpo_mm.objectives import LogProbs, sdpo_lambda_image
from dpo_mm.policies.adapters import SavedLora, Weights, add_lora, pipeline_modules
from dpo_mm.policies.diffusion import run_summary, sampling, weight_files
from dpo_mm.policies.diffusion.buckets import Crop, Size, cover, scale_and_crop
from dpo_mm.policies.diffusion.collate import collate
from dpo_mm.policies.diffusion.denoising_errors import DenoisingErrors, pair_errors, surrogate_log_probs
from dpo_mm.policies.diffusion.latents import image_posterior, latent_scale
from dpo_mm.policies.diffusion.meta_pipeline import load_on_meta_device
from dpo_mm.policies.diffusion.noise_process import noise_process_for
from dpo_mm.policies.diffusion.of_pipeline import policy_of_pipeline
from dpo_mm.policies.diffusion.pipeline_checks import check_components
from dpo_mm.policies.diffusion.placement import Encoders, move, on_device
from dpo_mm.policies.diffusion.text_encoder_lora import add_encoder_loras, start_weights
from dpo_mm.policies.protocol import Batch

Prompt = dict[str, Tensor]
"""A family's encoded prompts: tensors by name, prompts first."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionPolicy:
    """A diffusers pipeline whose denoiser is trained on preferences."""

    required_components: ClassVar[tuple[str, ...]]
    """Components that the pipeline must have."""
    denoiser: ClassVar[str]
    """Name of the component that denoises."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Names of the modules that a LoRA adapts by default."""
    patch: ClassVar[int] = 1
    """Latent pixels per edge of one token of the denoiser."""
    packs_latents: ClassVar[bool] = False
    """True if the denoiser takes 2x2 latent pixels as one token, with four times as many channels as the latents."""
    vae_is_video: ClassVar[bool] = False
    """True if the autoencoder takes an image as a video of one frame."""
    frames: int = 1
    """Frames of a clip, which is an image with its frames side by side, see `dpo_mm.data.clips`. 1 for images."""
    conditioning_columns: ClassVar[tuple[str, ...]] = ()
    """Columns per image, (images, ...), on which the denoiser is conditioned if the rows have them."""
    is_image_editing: ClassVar[bool] = False
    """True if the prompt contains images to edit: `image_source` in rows, `source` (images, c, h, w) in prompts."""
    takes_several_sources: ClassVar[bool] = False
    """True if a prompt may contain several: `source_2`, `source_3` and so on in prompts."""
    prompts_show_sources: ClassVar[bool] = False
    """True if the text encoder sees the images to edit."""
    cuts_prompts: ClassVar[bool] = False
    """True if the prompts of a batch, which have a mask, are cut to the longest one. The host does it in `collate`."""
    text_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that `train_text_encoder` trains with the denoiser, for families with `tokenize` and `embed`."""
    edits_optionally: ClassVar[bool] = False
    """True if all prompts of a list may contain an image to edit, or none. Edits are made one prompt at a time."""
    one_prompt_per_call: ClassVar[bool] = False
    """True if the pipeline takes one prompt per call, or its image of a prompt depends on the lengths of the others."""
    kohya_prefix: ClassVar[str | None] = None
    """Prefix of the denoiser's module names in kohya's and ComfyUI's files. None if no such format is known."""
    modality: ClassVar[Literal["image"]] = "image"
    config: TrainConfig

    def __init__(self, pipe: Any, source: str) -> None:
        self.pipe, self.source = pipe, source
        self.vae, self.scheduler = pipe.vae, pipe.scheduler
        self.dtype: torch.dtype = getattr(pipe, self.denoiser).dtype
        self.noise_process = noise_process_for(pipe.scheduler, source=source)
        self.latent_scale = latent_scale(pipe.vae.config)
        self.resolution = self.native_resolution()
        self.target_size: Size | None = None
        self.base_pipe: Any = None
        self.encoder_loras: dict[str, SavedLora] = {}
        self.trained_encoders: tuple[str, ...] = ()
        self.with_encoders: nn.Module | None = None
        self.home: torch.device | None = None
        """Device to which components are moved one at a time. None: all of them are on it."""

    # Overridden by families

    @classmethod
    def open(cls, source: str, **options: Any) -> Any:
        """Load the diffusers pipeline with these options of `load_pipeline`. Override it if components may be missing."""
        from diffusers import DiffusionPipeline

        return load_pipeline(DiffusionPipeline, source, **options)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Encode prompts as the tensors on which the denoiser is conditioned, prompts first, on the CPU."""
        raise NotImplementedError

    def encode_edit(self, prompt: str, sources: Sequence[Image.Image]) -> Prompt:
        """Encode one prompt with its images to edit as in `encode_prompts`, if `prompts_show_sources`."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> Prompt:
        """Return the tokens of prompts, prompts first."""
        raise NotImplementedError

    def embed(self, tokens: Prompt) -> Prompt:
        """Encode tokens as `encode_prompts` encodes texts, with gradient."""
        raise NotImplementedError

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """Call the denoiser on noisy latents.

        Args:
            denoiser: the denoiser, possibly wrapped.
            latents: noisy latents, (images, channels, height, width).
            timestep: (images,), in the scheduler's units.
            prompt: encoded prompts, images first.

        Returns:
            The prediction, in the shape of the latents and with the sign that the scheduler expects.
        """
        raise NotImplementedError

    def native_resolution(self) -> int:
        """Return the pixels per edge of the images that the pipeline generates by default."""
        size = self.model.config.get("sample_size") or self.pipe.default_sample_size  # type: ignore[union-attr, operator]
        return size * self.pipe.vae_scale_factor

    def latent_channels(self) -> int:
        """Return the number of channels of the autoencoder's latents."""
        return self.model.config.in_channels // (4 if self.packs_latents else 1)  # type: ignore[union-attr, operator, return-value]

    def size_conditioning(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Compute the columns of `conditioning_columns`, (images, ...) each, on the CPU."""
        return {}

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Return the pipeline's keyword arguments to generate one image per prompt.

        Args:
            prompts: text per image.
            guidance: guidance scale.
            sources: the images to edit per prompt, for image-editing families.
        """
        return {"prompt": prompts, "guidance_scale": guidance, "height": self.resolution, "width": self.resolution}

    # Loading

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        precision: str = "fp32",
        device: str | None = None,
        resolution: int | None = None,
        weights: bool = True,
        quantize: str | None = None,
        one_at_a_time: bool = False,
    ) -> Self:
        """Load a pipeline as a policy.

        Args:
            source: a pipeline folder or hub id.
            revision: a branch, tag or commit of a hub model.
            precision: fp32, bf16 or fp16.
            device: cpu, cuda or cuda:1. None is the GPU if there is one.
            resolution: pixels per edge. None is the pipeline's own resolution.
            weights: False reads no weights and leaves all modules on the meta device, see `load_on_meta_device`.
            quantize: nf4, int8 or fp8 for the denoiser and large text encoders, see `dpo_mm.models.quantization`.
            one_at_a_time: True leaves all on the CPU. `on_device` and `free_encoders` move what is needed, see `placement`.

        Raises:
            ValueError: if a component is missing, the precision is unknown, or the resolution is not supported.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r} is unknown. Expected one of {', '.join(DTYPES)}")
        check_components(source, cls.required_components)
        options: dict[str, Any] = {"revision": revision, "dtype": DTYPES[precision]}
        if weights and quantize:
            options |= {"quantize": quantize, "device": device}
        pipe = cls.open(source, **options) if weights else load_on_meta_device(source, **options)
        how: dict[str, Any] = {"weights": weights, "one_at_a_time": one_at_a_time}
        return policy_of_pipeline(cls, pipe, source, device=device, resolution=resolution, **how)

    @property
    def model(self) -> nn.Module:
        """The pipeline's denoiser."""
        return getattr(self.pipe, self.denoiser)

    @property
    def device(self) -> torch.device:
        """Device on which the pipeline computes."""
        return self.home or self.model.device  # type: ignore[return-value]

    def prepare(self, config: TrainConfig) -> None:
        """Freeze the pipeline, then add a LoRA to the denoiser or make all of it trainable. See `Policy.prepare`."""
        self.config = config
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        if config.tuning == "lora":
            add_lora(self.model, config, self.lora_targets)
            add_encoder_loras(self, config)
        elif config.tuning == "full":
            self.model.requires_grad_(True).to(torch.float32)
            self.dtype = torch.float32
        else:
            raise ValueError(f"tuning {config.tuning!r} is unknown. Expected 'lora' or 'full'")
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]

    # Encoding, done once per dataset

    def fingerprint(self) -> str:
        """Return a hash of everything that determines an encoding.

        It contains the encoders' weights and configurations, the tokenizers, the dtype and the resolution.
        """
        encoders = {
            name: part
            for name, part in self.pipe.components.items()
            if part is not None and part is not self.model and name != "scheduler"
        }
        settings = [plain_settings(dict(self.pipe.config)), *(["tokens"] if self.trained_encoders else [])]
        settings += [self.frames] if self.frames > 1 else []
        return content_hash([type(self).__name__, self.resolution, str(self.vae.dtype), encoders, *settings])

    def stored_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Encode prompts for all steps of a run: as embeddings, or as tokens if the text encoders train."""
        return self.tokenize(prompts) if self.trained_encoders else self.encode_prompts(prompts)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Encode images with the autoencoder.

        Returns:
            Mean and standard deviation of the posterior, (images, channels, height, width) each, float32, on the CPU.
        """
        pixels = torch.stack([self.pixels(image) for image in images]).to(self.device)
        return image_posterior(self.vae, pixels, as_video=self.vae_is_video)

    def encode_sources(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images to edit as the pipeline does, (images, channels, h, w), float32, on the CPU."""
        return self.encode_images(images)[0]

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an image to the autoencoder's input, (3, height, width) of the target size, in [-1, 1]."""
        return torch.from_numpy(np.asarray(self.resize_and_crop(image), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Scale an image to cover the target size and crop it to the centre."""
        return scale_and_crop(to_rgb(image), self.crop_box(image.size))

    def crop_box(self, size: Size) -> Crop:
        """Return the scaling and crop that fit an image of this (width, height) to the target size."""
        return cover(size, self.target_size or (self.resolution, self.resolution))

    @contextlib.contextmanager
    def at_size(self, size: Size) -> Iterator[None]:
        """Context manager in which images are resized to this (width, height) instead of the resolution's square."""
        self.target_size = size
        try:
            yield
        finally:
            self.target_size = None

    def on_device(self, encoders: Encoders) -> AbstractContextManager[None]:
        """Context manager in which text encoders or the autoencoder are on the device. See `ImagePolicy.on_device`."""
        return on_device(self, encoders)

    def free_encoders(self) -> None:
        """Release all modules except those that train, and move these to the device."""
        self.vae, trained = None, (self.denoiser, *self.trained_encoders)
        for name, part in self.pipe.components.items():
            if name not in trained and isinstance(part, nn.Module):
                setattr(self.pipe, name, None)
        if self.home is not None:
            move(pipeline_modules(self.pipe), self.home)
            self.home = None

    # Training

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Make a batch from encoded rows, whose noise depends only on seed, row id and epoch. See `Policy.collate`."""
        return collate(self, rows)

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Return the number of the denoiser's tokens for latents of this shape, (..., height, width)."""
        return shape[-2] * shape[-1] // self.patch**2

    def denoising_errors(
        self, model: nn.Module, latents: Tensor, noise: Tensor, timestep: Tensor, prompt: Prompt
    ) -> DenoisingErrors:
        """Compute the squared prediction error of each image at its own noise and timestep.

        Args:
            model: the denoiser, possibly wrapped.
            latents: clean latents, (images, channels, height, width).
            noise: standard normal noise in the same shape.
            timestep: (images,), in the scheduler's units.
            prompt: encoded prompts, images first.

        Returns:
            The mean error per image and the residual. If `loss_weighting` is epsilon, the mean is that of the noise.
        """
        noisy = self.noise_process.add_noise(latents, noise, timestep).to(self.dtype)
        prompt = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in prompt.items()}
        prediction = self.denoise(model, noisy, timestep, prompt)
        residual = prediction.float() - self.noise_process.target(latents, noise, timestep)
        mean = residual.square().flatten(1).mean(1)
        if self.config.loss_weighting == "epsilon":
            mean = mean * self.noise_process.epsilon_error_scale(timestep)
        return DenoisingErrors(mean, residual.detach())

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """Compute -1/2 of the denoising errors of chosen and rejected in one forward pass. See `Policy.log_probs`."""
        return surrogate_log_probs(pair_errors(self, model, batch), pairs=len(batch["chosen"]))

    def log_probs_and_gradient_scale(self, model: nn.Module, batch: Batch, *, slack: float) -> tuple[LogProbs, Tensor]:
        """Compute `log_probs` and `sdpo`'s scale of the rejected gradient in one forward pass, (pairs,)."""
        errors = pair_errors(self, model, batch)
        scale = sdpo_lambda_image(*errors.residual.chunk(2), slack=slack)
        return surrogate_log_probs(errors, pairs=len(scale)), scale

    def adapter_off(self) -> AbstractContextManager[None]:
        """Context manager with the weights from before the first step. Raises ValueError if there is no LoRA."""
        return start_weights(self)

    def frozen_copy(self) -> nn.Module:
        """Return a copy of the denoiser that is never trained."""
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    # Files

    def save(self, folder: Path, weights: Weights = None) -> None:
        """Write the LoRA in diffusers' format (and in kohya's if the config says so), or the whole denoiser."""
        weight_files.save(self, folder, weights)

    def load_weights(self, folder: Path) -> None:
        """Load what `save` wrote into the prepared model. Raises ValueError if it does not fit."""
        weight_files.load_weights(self, folder)

    def usage_snippet(self, base: str, folder: str) -> list[str]:
        """Return lines of Python that load the trained weights with diffusers. See `ImagePolicy.usage_snippet`."""
        return weight_files.usage_snippet(self, base, folder)

    # Generation

    def load_adapter(self, folder: str | Path) -> None:
        """Load a trained LoRA, denoiser or pipeline for generation. Raises ValueError if the folder contains none."""
        sampling.load_adapter(self, Path(folder))

    def at_scale(self, scale: float) -> AbstractContextManager[None]:
        """Context manager that sets the weight of what `load_adapter` loaded. See `ImagePolicy.at_scale`."""
        return sampling.at_scale(self, scale)

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
        """Generate one image per prompt and seed, a batch at a time. See `ImagePolicy.sample`."""
        return sampling.sample(
            self, prompts, seeds, steps=steps, guidance=guidance, batch_size=batch_size, scale=scale, sources=sources
        )

    # Summary of the run

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Return family, target, reduction, loss weighting, and beta in other conventions."""
        return run_summary.describe(self, config)
