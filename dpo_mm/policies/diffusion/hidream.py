"""HiDream-I1: pooled states of two CLIP encoders, T5, all layers of Llama, and a denoiser with experts that predicts -velocity.

Its training path keeps gradients through the experts and has the values of the path for generation, which has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt


class HiDream(DiffusionPolicy):
    """Policy of `HiDreamImagePipeline`. Source: Cai et al. 2025 (2505.22705).

    The published folders lack Llama. Save a pipeline with it as a folder (`pipe.save_pretrained`).
    """

    required_components = (
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "tokenizer", "tokenizer_2",
        "tokenizer_3", "tokenizer_4", "transformer", "scheduler",
    )  # fmt: skip
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
    patch = 2

    def __init__(self, pipe: Any, source: str) -> None:
        super().__init__(pipe, source)
        # Without it, the output of the training path is not unpatchified.
        pipe.transformer.register_to_config(force_inference_output=True)

    def sampling_kwargs(
        self, prompts: list[str], guidance: float, sources: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Any]:
        """Generate at the policy's resolution. The pipeline scales all sizes to the area of its default size."""
        self.pipe.default_sample_size = self.resolution // self.pipe.vae_scale_factor
        return super().sampling_kwargs(prompts, guidance)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prompt:
        """States of T5, (prompts, tokens, width), of Llama, (prompts, layers, tokens, width), and pooled, (prompts, width)."""
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"t5": t5.cpu(), "llama": llama.transpose(0, 1).cpu(), "pooled": pooled.cpu()}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        velocity = denoiser(
            hidden_states=latents,
            timesteps=timestep,
            encoder_hidden_states_t5=prompt["t5"],
            encoder_hidden_states_llama3=prompt["llama"].transpose(0, 1),
            pooled_embeds=prompt["pooled"],
            return_dict=False,
        )[0]
        return -velocity
