"""Image generators as a policy: the log-prob of a picture is -1/2 of its denoising error.

At the batch's own (noise, timestep), the same for chosen and rejected, for policy and reference:

    log p(x) = -1/2 * mean over latent elements of (prediction - target)^2

Noising and target are the scheduler's own, see `noise_process`. Errors are taken in float32 after the network: at beta 5000 a
half-precision error would put noise of standard deviation 0.2 to 0.9 on the logit. Source: Wallace et al. 2023 (2311.12908) eq. 14.

A family is a subclass that says which parts its pipeline has, how prompts are encoded and how its denoiser is called;
README.md beside this file shows how to write one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.model_loading import load_module, load_pipeline
from dpo_mm.objectives import LogProbs, sdpo_lambda_image
from dpo_mm.policies.adapters import (
    LORA_FILE,
    Weights,
    add_lora,
    has_lora,
    read_lora,
    save_kohya,
    save_lora,
    save_whole,
)
from dpo_mm.policies.diffusion import sampling
from dpo_mm.policies.diffusion.buckets import Crop, Size, cover
from dpo_mm.policies.diffusion.collate import collate
from dpo_mm.policies.diffusion.latents import latent_scale, posterior
from dpo_mm.policies.diffusion.meta_pipeline import load_on_meta_device
from dpo_mm.policies.diffusion.noise_process import noise_process_for
from dpo_mm.policies.protocol import Batch

Prompt = dict[str, Tensor]
"""A family's encoded prompts, each tensor with the prompts first."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DenoisingErrors(NamedTuple):
    """Errors of a batch: `mean`, (images,), float32, and what it is the mean square of, `residual`, (images, ...)."""

    mean: Tensor
    residual: Tensor


def _surrogate_log_probs(errors: DenoisingErrors) -> LogProbs:
    chosen, rejected = (-0.5 * errors.mean).chunk(2)
    ones = torch.ones_like(chosen)
    return LogProbs(chosen, rejected, ones, ones, is_likelihood=False)


class DiffusionPolicy:
    """A diffusers pipeline whose denoiser preferences act on."""

    needs: ClassVar[tuple[str, ...]]
    """Components that the pipeline must have."""
    denoiser: ClassVar[str]
    """Name of the one that denoises."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Modules that a LoRA adapts unless told otherwise."""
    patch: ClassVar[int] = 1
    """Latent pixels on a side of what is one token of the denoiser."""
    vae_is_video: ClassVar[bool] = False
    """Whether the autoencoder takes a picture as a film of one frame."""
    conditioning_columns: ClassVar[tuple[str, ...]] = ()
    """Facts of each picture, (images, ...), that the denoiser is told of where the rows have them."""
    is_image_editing: ClassVar[bool] = False
    """Whether a picture to edit is part of the prompt: rows then have `image_source`, prompts `source` (images, c, h, w)."""
    kohya_prefix: ClassVar[str | None] = None
    """What kohya's and ComfyUI's names of the denoiser's modules begin with; None where no such format is known."""

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
        self.base_denoiser: nn.Module | None = None

    # What a family writes

    @classmethod
    def open(cls, source: str, *, revision: str | None, dtype: torch.dtype) -> Any:
        """The stock pipeline."""
        from diffusers import DiffusionPipeline

        return load_pipeline(DiffusionPipeline, source, revision=revision, dtype=dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """What the denoiser is told of each prompt, on the CPU."""
        raise NotImplementedError

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """The denoiser's prediction for noisy latents (images, c, h, w) at timestep (images,), in the scheduler's sign."""
        raise NotImplementedError

    def native_resolution(self) -> int:
        """Pixels on a side of what the pipeline draws unless told otherwise."""
        size = self.model.config.get("sample_size") or self.pipe.default_sample_size  # type: ignore[union-attr, operator]
        return size * self.pipe.vae_scale_factor

    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return self.model.config.in_channels  # type: ignore[union-attr, return-value]

    def size_conditioning(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The columns of `conditioning_columns`, (images, ...) each, on the CPU."""
        return {}

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Image.Image] = ()
    ) -> dict[str, Any]:
        """The pipeline's arguments for drawing these prompts with this guidance; sources: the pictures to edit."""
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
    ) -> Self:
        """The policy of a pipeline folder or hub id. resolution: pixels on a side; None: the pipeline's own.

        weights: False reads none and leaves all modules on the meta device, see `load_on_meta_device`.

        Raises ValueError where a component is missing, or precision or resolution won't do.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(DTYPES)}")
        if Path(source).is_dir():
            for part in cls.needs:
                if not (Path(source) / part).is_dir():
                    raise ValueError(
                        f"model {source!r} has no {part}; expected the folder {part}/ that `pipe.save_pretrained` writes"
                    )
        opener = cls.open if weights else load_on_meta_device
        pipe = opener(source, revision=revision, dtype=DTYPES[precision])
        pipe.set_progress_bar_config(disable=True)
        if weights:
            pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        policy = cls(pipe, source)
        if resolution is not None:
            step = pipe.vae_scale_factor * cls.patch
            if resolution <= 0 or resolution % step:
                raise ValueError(f"resolution {resolution}: {source!r} takes multiples of {step}")
            policy.resolution = resolution
        return policy

    @property
    def model(self) -> nn.Module:
        return getattr(self.pipe, self.denoiser)

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[return-value]

    def prepare(self, config: TrainConfig) -> None:
        """Make the denoiser ready to train as the config says: a LoRA, or all of it. Everything else is frozen."""
        self.config = config
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        if config.tuning == "lora":
            add_lora(self.model, config, self.lora_targets)
        elif config.tuning == "full":
            self.model.requires_grad_(True).to(torch.float32)
            self.dtype = torch.float32
        else:
            raise ValueError(f"tuning {config.tuning!r} is unknown; expected 'lora' or 'full'")
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]

    # Frozen work, done once

    def fingerprint(self) -> str:
        """A hash of all that decides what a picture or prompt is encoded to: encoders' weights, dtype, resolution."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.resolution} {self.vae.dtype}".encode())
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.model:
                for name, tensor in part.state_dict().items():
                    digest.update(name.encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the autoencoder, each (images, c, h, w), float32 on the CPU."""
        pixels = torch.stack([self.pixels(image) for image in images]).to(self.device)
        mean, std = posterior(self.vae, pixels[:, :, None] if self.vae_is_video else pixels)
        if self.vae_is_video:
            mean, std = mean.squeeze(2), std.squeeze(2)
        return mean.float().cpu(), std.float().cpu()

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture as the autoencoder takes it, (3, height, width) of the frame, in [-1, 1]."""
        return torch.from_numpy(np.asarray(self.resize_and_crop(image), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """A picture scaled to cover the frame and cropped to its centre."""
        scaled, box = self.crop_box(image.size)
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.LANCZOS)
        return image.convert("RGB").crop(box)

    def crop_box(self, size: Size) -> Crop:
        """How a picture of this (width, height) is fitted to the frame at hand."""
        return cover(size, self.target_size or (self.resolution, self.resolution))

    @contextlib.contextmanager
    def at_size(self, frame: Size) -> Iterator[None]:
        """Within it pictures are fitted to this (width, height) instead of the resolution's square."""
        self.target_size = frame
        try:
            yield
        finally:
            self.target_size = None

    def free_encoders(self) -> None:
        """Let all but the denoiser leave memory."""
        self.vae = None
        for name, part in self.pipe.components.items():
            if name != self.denoiser and isinstance(part, nn.Module):
                setattr(self.pipe, name, None)

    # Training

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """One batch from encoded rows, see `batches`; each row's draw is a pure function of (seed, id, visit)."""
        return collate(self, rows)

    def tokens(self, shape: tuple[int, ...]) -> int:
        """Tokens of the denoiser for latents of this shape, (..., h, w)."""
        return shape[-2] * shape[-1] // self.patch**2

    def denoising_errors(
        self, model: nn.Module, latents: Tensor, noise: Tensor, timestep: Tensor, prompt: Prompt
    ) -> DenoisingErrors:
        """Compute the squared prediction error of each image at its own noise and timestep.

        Args:
            model: the denoiser, possibly wrapped.
            latents, noise: (images, channels, height, width).
            timestep: (images,), in the scheduler's units.
            prompt: encoded prompts, images first.

        Returns:
            The mean error per image, of the noise if `loss_weighting` is epsilon, and the residual.
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
        """Return -1/2 of the denoising errors of chosen and rejected, from one forward, (pairs,) each."""
        return _surrogate_log_probs(self.pair_errors(model, batch))

    def log_probs_and_gradient_scale(self, model: nn.Module, batch: Batch, *, slack: float) -> tuple[LogProbs, Tensor]:
        """Return `log_probs` and `sdpo`'s scale of the rejected gradient, (pairs,), from the same forward."""
        errors = self.pair_errors(model, batch)
        return _surrogate_log_probs(errors), sdpo_lambda_image(*errors.residual.chunk(2), slack=slack)

    def pair_errors(self, model: nn.Module, batch: Batch) -> DenoisingErrors:
        """Denoising errors of the chosen images, then of the rejected ones, (2 * pairs,)."""
        latents = torch.cat([batch["chosen"], batch["rejected"]])
        noise, timestep = batch["noise"].repeat(2, 1, 1, 1), batch["timestep"].repeat(2)
        prompt = {name: torch.cat([value, value]) for name, value in batch["prompt"].items()}
        for name in self.conditioning_columns:
            if f"chosen_{name}" in batch:
                prompt[name] = torch.cat([batch[f"chosen_{name}"], batch[f"rejected_{name}"]])
        return self.denoising_errors(model, latents, noise, timestep, prompt)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        if not has_lora(self.model):
            raise ValueError(
                "reference 'adapter_off' needs a LoRA (tuning: lora); full fine-tuning takes 'frozen_copy'"
            )
        self.model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.enable_adapters()  # type: ignore[operator]

    def frozen_copy(self) -> nn.Module:
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    # Files

    def save(self, folder: Path, weights: Weights = None) -> None:
        """The LoRA in diffusers' own format with its rank and alpha, and in kohya's where asked; or the whole denoiser."""
        if has_lora(self.model):
            save_lora(self.pipe, self.denoiser, folder, weights)
            if self.config.lora_format == "kohya":
                assert self.kohya_prefix is not None
                save_kohya(self.model, self.kohya_prefix, folder, weights)
        else:
            save_whole(self.model, folder / self.denoiser, weights)

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into the model as `prepare` set it up. Raises ValueError where it does not fit."""
        if has_lora(self.model):
            read_lora(self.model, self.denoiser, folder / LORA_FILE)
        else:
            stored = load_module(type(self.model), str(folder / self.denoiser))
            self.model.load_state_dict(stored.state_dict())

    def usage_snippet(self, base: str, folder: str) -> list[str]:
        """Python that draws with what `save` wrote in stock classes, a line at a time; for its card."""
        opened = f'pipe = DiffusionPipeline.from_pretrained("{base}", dtype={self.dtype})'
        if self.config.tuning == "lora":
            return [opened, f'pipe.load_lora_weights("{folder}")']
        part = f"pipe.{self.denoiser}"
        return [opened, f'{part} = type({part}).from_pretrained("{folder}", subfolder="{self.denoiser}")']

    # Drawing

    def load_adapter(self, folder: str | Path) -> None:
        """Load a tuned adapter or denoiser with the stock library, for drawing. Raises ValueError where there is none."""
        sampling.load_adapter(self, Path(folder))

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
        """Generate one image per prompt and seed, a batch at a time. See `ImagePolicy.sample`."""
        return sampling.sample(
            self, prompts, seeds, steps=steps, guidance=guidance, batch_size=batch_size, scale=scale, sources=sources
        )

    # What the run says of itself

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Family, target, reduction and what beta is in other conventions."""
        elements = self.latent_channels() * (self.resolution // self.pipe.vae_scale_factor) ** 2
        return {
            "family": f"{type(self).__name__}, {type(self.pipe).__name__}",
            "target": f"{self.noise_process.name} ({type(self.noise_process).__name__}), error in float32",
            "reduction": f"mean over {elements:,} latent elements, 1/2 inside the log-ratio",
            "weighting": self._weighting(config),
            **({} if isinstance(config.beta, str) else {"effective beta": self._beta(config.beta, elements)}),
        }

    def _weighting(self, config: TrainConfig) -> str:
        name = self.noise_process.name
        if name == "epsilon":
            return "target, which is the noise"
        share = {"v": "alpha_bar(t)", "velocity": "(1 - s)^2"}.get(name, "factor")
        if config.loss_weighting == "epsilon":
            return f"epsilon: the {name} error times {share}, which is the noise's error; beta is constant on the noise"
        return f"target: beta is constant on the {name} error; on the noise it is beta / {share}"

    def _beta(self, beta: float, elements: int) -> str:
        return (
            f"{beta:g} as the Diffusion-DPO authors mean it = {beta / 2:g} in diffusers' script "
            f"= {beta / elements:.3g} on summed errors"
        )
