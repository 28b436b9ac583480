"""HiDream-I1: pooled states of two CLIP encoders, T5, all layers of Llama, and a denoiser with experts that predicts -velocity.

Its training path keeps gradients through the experts and has the values of the path for generation, which has none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

EXPERTS = "MOEFeedForwardSwiGLU"
"""Class of a layer of experts."""


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
        if pipe.transformer.device.type == "meta":
            run_without_values(pipe.transformer)

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


def run_without_values(transformer: Any) -> None:
    """Replace what depends on values, for the meta device, where memory is counted: routes to experts, and image sizes."""
    for layer in transformer.modules():
        if type(layer).__name__ == EXPERTS:
            layer.forward = functools.partial(run_evenly, layer)
    patch = transformer.config.patch_size

    def unpatchify_square(tokens: Tensor, *_: Any) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        patches = tokens.reshape(len(tokens), side, side, patch, patch, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, side * patch, side * patch)

    transformer.unpatchify = unpatchify_square


def run_evenly(layer: Any, states: Tensor) -> Tensor:
    """Run a layer of experts as in training, with an equal share of the tokens for each of them.

    Args:
        layer: of diffusers' class EXPERTS.
        states: (images, tokens, width).
    """
    _, weights, _ = layer.gate(states)
    tokens = states.flatten(0, 1).repeat_interleave(layer.num_activated_experts, dim=0)
    shares = tokens.tensor_split(len(layer.experts))
    results = torch.cat([expert(share) for expert, share in zip(layer.experts, shares, strict=True)])
    mixed = (results.unflatten(0, weights.shape) * weights.unsqueeze(-1)).sum(1)
    return mixed.view(states.shape).to(states.dtype) + layer.shared_experts(states)
