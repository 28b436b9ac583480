"""FLUX.1 Kontext: a picture is edited as the prompt says; the picture to edit is part of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion import flux
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class FluxKontext(DiffusionPolicy):
    """`FluxKontextPipeline`. Rows bring the picture to edit as `image_source`; it is fitted like the other two."""

    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"
    lora_targets = flux.TARGETS
    kohya_prefix = "lora_transformer"
    patch = 2
    is_image_editing = True
    guidance: ClassVar[float] = 2.5
    """What the denoiser is told in training: what its model card draws with."""

    def latent_channels(self) -> int:
        return flux.channels(self)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        return flux.encoded(self, prompts)

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return flux.velocity(self, denoiser, latents, timestep, prompt, source=prompt["source"], guidance=self.guidance)

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Image.Image] = ()
    ) -> dict[str, Any]:
        """The pipeline's arguments; sources are fitted here, so that it neither resizes them nor moves the size."""
        return {
            **super().sampling_kwargs(prompts, guidance),
            "image": [self.resize_and_crop(source) for source in sources],
            "max_sequence_length": flux.text_tokens(self),
            "max_area": self.resolution**2,
            "_auto_resize": False,
        }
