"""FLUX.1 Kontext: image editing. The image to edit is part of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion import flux_denoiser
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class FluxKontext(DiffusionPolicy):
    """Policy of `FluxKontextPipeline`.

    Rows have the image to edit as `image_source`. It is resized and cropped in the same way as chosen and rejected.
    """

    required_components = (
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "scheduler",
    )
    denoiser = "transformer"
    packs_latents = True
    lora_targets = flux_denoiser.TARGETS
    kohya_prefix = "lora_transformer"
    patch = 2
    is_image_editing = True
    guidance: ClassVar[float] = 2.5
    """Guidance on which the denoiser is conditioned in training, as in its model card."""

    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """Hidden states of T5, (prompts, tokens, width), and CLIP's pooled state, (prompts, width)."""
        return flux_denoiser.encode_prompts(self, prompts)

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return flux_denoiser.predict_velocity(
            self, denoiser, latents, timestep, prompt, source=prompt["source"], guidance=self.guidance
        )

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Resize the sources here, so that the pipeline changes neither them nor the size of the result."""
        return {
            **super().sampling_kwargs(prompts, guidance),
            "image": [self.resize_and_crop(images[0]) for images in sources],
            "max_sequence_length": flux_denoiser.max_prompt_tokens(self),
            "max_area": self.resolution**2,
            "_auto_resize": False,
        }
