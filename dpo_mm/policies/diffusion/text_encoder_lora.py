"""LoRA on the text encoders of a pipeline, next to that of its denoiser.

The embeddings of a prompt then change with every step. So tokens are stored in place of embeddings, and each step encodes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.policies.adapters import SavedLora, add_lora, has_lora, saved_lora
from dpo_mm.policies.lora_layers import reference_weights
from dpo_mm.policies.protocol import Batch, ImagePolicy, Policy

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy, Prompt

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Modules of a text encoder that get a LoRA, as in diffusers' training scripts."""


class DenoiserWithEncoders(nn.Module):
    """The denoiser and the text encoders that train with it, for the optimizer. A call is a call of the denoiser."""

    def __init__(self, denoiser: nn.Module, encoders: dict[str, nn.Module]) -> None:
        super().__init__()
        self.denoiser, self.encoders = denoiser, nn.ModuleDict(encoders)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.denoiser(*arguments, **keywords)


def select_encoders(policy: ImagePolicy, config: TrainConfig) -> None:
    """Set which text encoders a policy will train. Call it before prompts are encoded."""
    policy.trained_encoders = policy.text_encoders if config.train_text_encoder else ()


def refuse_text_encoder(config: TrainConfig, family: Any, reference: str) -> None:
    """Refuse `train_text_encoder` for a family or a reference that does not go with it.

    Args:
        config: settings of the run.
        family: policy class of the model.
        reference: name of the run's reference.

    Raises:
        ValueError: if it does not. It names the setting and the fix.
    """
    if not config.train_text_encoder:
        return
    if config.tuning != "lora":
        return  # it has no effect then, which is refused for all settings of a LoRA
    if not getattr(family, "text_encoders", ()):
        raise ValueError(
            f"train_text_encoder: {family.__name__} trains no text encoder, only StableDiffusion and StableDiffusionXL do. Remove it"
        )
    if reference == "frozen_copy":
        raise ValueError("train_text_encoder: reference frozen_copy copies the denoiser only. Take adapter_off")


def encoders_of(policy: DiffusionPolicy) -> dict[str, Any]:
    """Return the text encoders that train, by their names in the pipeline."""
    return {name: getattr(policy.pipe, name) for name in policy.trained_encoders}


def trained_model(policy: Policy) -> nn.Module:
    """Return the module with all weights that train: the policy's model, or with the text encoders that train."""
    return policy.with_encoders or policy.model


def add_encoder_loras(policy: DiffusionPolicy, config: TrainConfig) -> None:
    """Add a LoRA to each text encoder that trains. An attached adapter trains instead."""
    encoders = encoders_of(policy)
    for encoder in encoders.values():
        add_lora(encoder, dataclasses.replace(config, lora_targets=None), TARGETS)
        if config.gradient_checkpointing:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    policy.with_encoders = DenoiserWithEncoders(policy.model, encoders) if encoders else None


def saved_encoders(policy: DiffusionPolicy) -> dict[str, SavedLora]:
    """Return the LoRAs of text encoders for the file of the result: those that train, and those of the start adapter."""
    return policy.encoder_loras | {name: saved_lora(encoder) for name, encoder in encoders_of(policy).items()}


@contextlib.contextmanager
def start_weights(policy: DiffusionPolicy) -> Iterator[None]:
    """Context manager with the weights from before the first step. Raises ValueError if there is no LoRA."""
    if not has_lora(policy.model):
        raise ValueError("reference 'adapter_off' needs a LoRA (tuning: lora). For full fine-tuning use 'frozen_copy'")
    with contextlib.ExitStack() as stack:
        for model in (policy.model, *encoders_of(policy).values()):
            stack.enter_context(reference_weights(model))
        yield


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the tokens of prompts as CLIP's pipelines make them, (prompts, tokens)."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(prompts), **options, return_tensors="pt").input_ids


def batch_prompts(policy: DiffusionPolicy, batch: Batch) -> list[Prompt]:
    """Return the embeddings of a batch's prompts, for the chosen and for the rejected images."""
    names = ["prompt", *(["rejected_prompt"] if "rejected_prompt" in batch else [])]
    prompts = [policy.embed(batch[name]) if policy.trained_encoders else batch[name] for name in names]
    return [prompts[0], prompts[-1]]
