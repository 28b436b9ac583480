"""Image generators as a policy: the log-prob of a picture is -1/2 of its denoising error.

At the batch's own (noise, timestep), the same for chosen and rejected, for policy and reference:

    log p(x) = -1/2 * mean over latent elements of (prediction - target)^2

Errors are taken in float32 after the network: at beta 5000 a half-precision error would put noise of standard
deviation 0.2 to 0.9 on the logit. Source: Wallace et al. 2023 (2311.12908) eq. 14.

A family is a subclass that says which pipeline it loads, how prompts are encoded and how its denoiser is called.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import FROM_DATA, LogProbs
from dpo_mm.policies import draws
from dpo_mm.policies.protocol import Batch

Prompt = dict[str, Tensor]
"""A family's encoded prompts, each tensor with the prompts first."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA_FILE = "pytorch_lora_weights.safetensors"


class DiffusionPolicy:
    """A diffusers pipeline whose denoiser preferences act on."""

    needs: ClassVar[tuple[str, ...]]
    """Components that the pipeline must have."""
    denoiser: ClassVar[str]
    """Name of the one that denoises."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Modules that a LoRA adapts unless told otherwise."""

    exact: ClassVar[bool] = False
    config: TrainConfig

    def __init__(self, pipe: Any, source: str) -> None:
        self.pipe, self.source = pipe, source
        self.vae, self.scheduler = pipe.vae, pipe.scheduler
        self.dtype: torch.dtype = getattr(pipe, self.denoiser).dtype
        self.latent_scale = float(pipe.vae.config.scaling_factor)
        self.latent_shift = float(getattr(pipe.vae.config, "shift_factor", None) or 0.0)
        self.resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.base_denoiser: nn.Module | None = None

    # What a family writes

    @classmethod
    def open(cls, source: str, *, revision: str | None, dtype: torch.dtype) -> Any:
        """The stock pipeline."""
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """What the denoiser is told of each prompt, on the CPU."""
        raise NotImplementedError

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """The denoiser's prediction for noisy latents (images, c, h, w) at timestep (images,)."""
        raise NotImplementedError

    # Loading

    @classmethod
    def load(
        cls, source: str, *, revision: str | None = None, precision: str = "fp32", device: str | None = None
    ) -> Self:
        """The policy of a pipeline folder or hub id.

        Raises ValueError where a component is missing or the precision is unknown.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(DTYPES)}")
        if Path(source).is_dir():
            for part in cls.needs:
                if not (Path(source) / part).is_dir():
                    raise ValueError(
                        f"model {source!r} has no {part}; expected the folder {part}/ that `pipe.save_pretrained` writes"
                    )
        pipe = cls.open(source, revision=revision, dtype=DTYPES[precision])
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(pipe, source)

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
            self._add_lora(config)
        elif config.tuning == "full":
            self.model.requires_grad_(True).to(torch.float32)
            self.dtype = torch.float32
        else:
            raise ValueError(f"tuning {config.tuning!r} is unknown; expected 'lora' or 'full'")
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]

    def _add_lora(self, config: TrainConfig) -> None:
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            adapter = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                init_lora_weights="gaussian",
                target_modules=list(config.lora_targets or self.lora_targets),
            )
            try:
                self.model.add_adapter(adapter)  # type: ignore[operator]
            except ValueError as error:
                raise ValueError(f"lora_targets: {error}") from error
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # Frozen work, done once

    def fingerprint(self) -> str:
        """A hash of all that decides what a picture or prompt is encoded to: encoders' weights, dtype, resolution."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.resolution} {self.vae.dtype}".encode())
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.model:
                for name, tensor in part.state_dict().items():
                    digest.update(name.encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the autoencoder, each (images, c, h, w), float32 on the CPU."""
        pixels = torch.stack([self.pixels(image) for image in images]).to(self.device, self.vae.dtype)
        encoded = self.vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean.float().cpu(), encoded.latent_dist.std.float().cpu()
        return encoded.latents.float().cpu(), torch.zeros_like(encoded.latents, dtype=torch.float32, device="cpu")

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture as the autoencoder takes it: scaled to cover the resolution, centre-cropped, (3, s, s) in [-1, 1]."""
        size = self.resolution
        scale = size / min(image.size)
        if scale != 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        array = np.asarray(image.convert("RGB").crop((left, top, left + size, top + size)), dtype=np.float32)
        return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)

    def drop_encoders(self) -> None:
        """Let all but the denoiser leave memory."""
        self.vae = None
        for name, part in self.pipe.components.items():
            if name != self.denoiser and isinstance(part, nn.Module):
                setattr(self.pipe, name, None)

    # Training

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """One batch from encoded rows; each row's draw is a pure function of (seed, id, visit).

        A row has id, visit, chosen_mean, chosen_std, rejected_mean, rejected_std (c, h, w) and the prompt's tensors.
        """
        kind, within = self.config.timesteps, self.config.timestep_range
        keys = [(self.config.seed, row["id"], row["visit"]) for row in rows]
        shape = tuple(rows[0]["chosen_mean"].shape)
        posterior = _stack([draws.noise(*key, shape, what="posterior") for key in keys])
        levels = [
            draws.level(*key, kind=kind, within=within, stratum=row.get("stratum", (0, 1)))
            for key, row in zip(keys, rows, strict=True)
        ]
        noise = [row.get("sign", 1) * draws.noise(*key, shape) for key, row in zip(keys, rows, strict=True)]
        batch: Batch = {
            "id": [row["id"] for row in rows],
            "chosen": self._latents(rows, "chosen", posterior),
            "rejected": self._latents(rows, "rejected", posterior),
            "noise": _stack(noise),
            "timestep": self.timesteps(torch.tensor(levels)),
            "level": torch.tensor(levels),
            "prompt": {name: torch.stack([row["prompt"][name] for row in rows]) for name in rows[0]["prompt"]},
        }
        for name in FROM_DATA:
            if name in rows[0]:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        for name in ("reference_chosen", "reference_rejected"):
            if name in rows[0]:
                batch[name] = torch.stack([row[name][row["visit"]] for row in rows])
        return batch

    def _latents(self, rows: list[dict[str, Any]], side: str, posterior: Tensor) -> Tensor:
        mean = torch.stack([row[f"{side}_mean"] for row in rows]).float()
        std = torch.stack([row[f"{side}_std"] for row in rows]).float()
        return (mean + std * posterior - self.latent_shift) * self.latent_scale

    def timesteps(self, levels: Tensor) -> Tensor:
        """Levels in [0, 1) as the scheduler's training timesteps, (images,) int64."""
        total = self.scheduler.config.num_train_timesteps
        return (levels * total).long().clamp(max=total - 1)

    def noisy(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents at a timestep of a variance-preserving schedule, (images, c, h, w) float32."""
        kept = self._kept(timestep)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the denoiser should predict, by the scheduler's own prediction type."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            kept = self._kept(timestep)
            return kept.sqrt() * noise - (1 - kept).sqrt() * latents
        raise ValueError(
            f"model {self.source!r}: prediction_type {kind!r} is not handled; expected epsilon or v_prediction"
        )

    def _kept(self, timestep: Tensor) -> Tensor:
        """The schedule's cumulative alpha at each timestep, (images, 1, 1, 1) float32."""
        return self.scheduler.alphas_cumprod.to(timestep.device)[timestep].float()[:, None, None, None]

    def errors(self, model: nn.Module, latents: Tensor, noise: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared prediction error of each image at its own draw, (images,), float32.

        What it is the mean of stays in `residual`, (images, ...), for objectives that scale by it (`safe`).
        """
        noisy = self.noisy(latents, noise, timestep).to(self.dtype)
        prediction = self.denoise(model, noisy, timestep, {k: v.to(self.dtype) for k, v in prompt.items()})
        residual = prediction.float() - self.target(latents, noise, timestep)
        self.residual = residual.detach()
        return residual.square().flatten(1).mean(1)

    def log_probs(self, model: nn.Module, batch: Batch) -> LogProbs:
        """-1/2 of the denoising errors, chosen and rejected in one forward, (pairs,) each."""
        latents = torch.cat([batch["chosen"], batch["rejected"]])
        noise, timestep = batch["noise"].repeat(2, 1, 1, 1), batch["timestep"].repeat(2)
        prompt = {name: torch.cat([value, value]) for name, value in batch["prompt"].items()}
        chosen, rejected = (-0.5 * self.errors(model, latents, noise, timestep, prompt)).chunk(2)
        ones = torch.ones_like(chosen)
        return LogProbs(chosen, rejected, ones, ones, exact=self.exact)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        if not getattr(self.model, "peft_config", None):
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

    def save(self, folder: Path) -> None:
        """The LoRA in diffusers' own format with its rank and alpha, or the whole denoiser under its name."""
        if getattr(self.model, "peft_config", None):
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict

            type(self.pipe).save_lora_weights(
                folder,
                **{f"{self.denoiser}_lora_layers": get_peft_model_state_dict(self.model)},
                **_collate_lora_metadata({self.denoiser: self.model}),
            )
        else:
            self.model.save_pretrained(folder / self.denoiser)  # type: ignore[operator]

    def load_weights(self, folder: Path) -> None:
        """Read what `save` wrote into the model as `prepare` set it up. Raises ValueError where it does not fit."""
        from safetensors.torch import load_file

        if getattr(self.model, "peft_config", None):
            from peft import set_peft_model_state_dict

            weights = {k.removeprefix(f"{self.denoiser}."): v for k, v in load_file(folder / LORA_FILE).items()}
            result: Any = set_peft_model_state_dict(self.model, weights, adapter_name="default")
            if result.unexpected_keys:
                raise ValueError(f"{folder / LORA_FILE}: {result.unexpected_keys[0]} does not fit this model's LoRA")
        else:
            stored = type(self.model).from_pretrained(folder / self.denoiser)  # type: ignore[attr-defined]
            self.model.load_state_dict(stored.state_dict())

    # Drawing

    def attach(self, folder: str | Path) -> None:
        """Load a tuned adapter or denoiser with the stock library, for drawing. Raises ValueError where there is none."""
        folder = Path(folder)
        if (folder / LORA_FILE).exists():
            self.pipe.load_lora_weights(str(folder), adapter_name="tuned")
        elif (folder / self.denoiser).is_dir():
            self.base_denoiser = self.model
            tuned = type(self.model).from_pretrained(folder / self.denoiser, dtype=self.dtype)  # type: ignore[attr-defined]
            setattr(self.pipe, self.denoiser, tuned.to(self.device))
        else:
            raise ValueError(f"adapter {str(folder)!r}: neither {LORA_FILE} nor a folder {self.denoiser}/ there")

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        batch_size: int,
        scale: float = 1.0,
    ) -> Iterator[list[Image.Image]]:
        """Pictures of each prompt from its own seed, a batch at a time; scale 0 draws with the base.

        The noise of a picture comes from its seed alone, whatever else is in the batch.
        """
        with self._scaled(scale):
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[part]]
                yield self.pipe(
                    list(prompts[part]), num_inference_steps=steps, guidance_scale=guidance, generator=generators
                ).images

    @contextlib.contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        """Within it the attached adapter acts with this strength."""
        adapted = bool(getattr(self.model, "peft_config", None))
        tuned = self.model
        if adapted:
            names = list(self.model.peft_config)  # type: ignore[union-attr, arg-type]
            self.model.set_adapters(names, [scale] * len(names)) if scale else self.model.disable_adapters()  # type: ignore[operator]
        elif self.base_denoiser is not None and scale not in (0.0, 1.0):
            raise ValueError(f"scale {scale}: a fully tuned denoiser has no scale but 0 and 1; sweep a LoRA instead")
        elif self.base_denoiser is not None and scale == 0:
            setattr(self.pipe, self.denoiser, self.base_denoiser)
        try:
            yield
        finally:
            if adapted and not scale:
                self.model.enable_adapters()  # type: ignore[operator]
            setattr(self.pipe, self.denoiser, tuned)

    # What the run says of itself

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """Family, target, reduction and what beta is in other conventions."""
        elements = self.model.config.in_channels * self.model.config.sample_size**2  # type: ignore[union-attr, operator]
        return {
            "family": f"{type(self).__name__}, {type(self.pipe).__name__}",
            "target": f"{self.scheduler.config.prediction_type}, error in float32",
            "reduction": f"mean over {elements:,} latent elements, 1/2 inside the log-ratio",
            "effective beta": (
                f"{config.beta:g} as the Diffusion-DPO authors mean it = {config.beta / 2:g} in diffusers' script "
                f"= {config.beta / elements:.3g} on summed errors"
            ),
        }


def _stack(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
