"""Model and rows of a run that the user has loaded, in place of names in the settings."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.files.content_key import content_hash
from dpo_mm.policies.adapter_sources import find_adapter
from dpo_mm.policies.diffusion.text_encoder_lora import select_encoders
from dpo_mm.policies.families import pipeline_family, text_family
from dpo_mm.policies.given_models import given_content, image_policy, is_pipeline, modules_of, text_policy
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.policies.start_adapter import start_from
from dpo_mm.training.builders import policy_options
from dpo_mm.training.given_rows import given_training_rows
from dpo_mm.training.training_rows import TrainingRows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

    from dpo_mm.policies.given_models import GivenModel, ProcessingClass


@dataclass(frozen=True)
class GivenInputs:
    """Model and rows that are loaded already. See `DPOTrainer` for the arguments."""

    config: TrainConfig
    model: GivenModel
    processing_class: ProcessingClass | None
    train_dataset: Dataset
    eval_dataset: Dataset | None
    ref_model: GivenModel | None
    callbacks: list[TrainerCallback]

    @property
    def family(self) -> Any:
        return text_family() if isinstance(self.model, nn.Module) else pipeline_family(self.model)

    @property
    def paths(self) -> tuple[str | None, ...]:
        return (self.config.model, self.config.adapter)

    @property
    def commit(self) -> str | None:
        return getattr(getattr(self.model, "config", None), "_commit_hash", None)

    @property
    def has_eval_rows(self) -> bool:
        return self.eval_dataset is not None

    @functools.cached_property
    def reference_model(self) -> nn.Module | None:
        """The frozen model, or the denoiser of a pipeline, on the device of the run."""
        if self.ref_model is None:
            return None
        model: Any = self.ref_model if isinstance(self.ref_model, nn.Module) else self._denoiser(self.ref_model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device).requires_grad_(False).eval()

    def _denoiser(self, pipe: GivenModel) -> nn.Module:
        return getattr(pipe, self.family.denoiser)

    def model_content(self) -> str:
        """Return a hash of the weights from before the first step."""
        return self._content

    @functools.cached_property
    def _content(self) -> str:
        content = given_content(self.model, self.processing_class)
        return content if self.ref_model is None else content_hash([content, given_content(self.ref_model, None)])

    def load_rows(self) -> TrainingRows:
        modality = self.family.modality
        return given_training_rows(self.train_dataset, self.eval_dataset, self.config, modality=modality)

    def load_policy(self) -> ImagePolicy | TextPolicy:
        return self.policy

    @functools.cached_property
    def policy(self) -> ImagePolicy | TextPolicy:
        """The policy of the model, with the adapter from which the run starts."""
        policy: ImagePolicy | TextPolicy
        if isinstance(self.model, nn.Module):
            policy = text_policy(self.model, self.processing_class, policy_options(self.config, "text"))
        else:
            policy = image_policy(self.model, policy_options(self.config, "image"))
            select_encoders(policy, self.config)
        if self.config.adapter:
            policy.load_adapter(find_adapter(self.config.adapter))
            start_from(policy, self.config)
        return policy

    def check_reference(self) -> None:
        """Check that the reference is a model like the trained one, and that the settings leave it that. Raises ValueError."""
        if self.ref_model is None:
            return
        is_pipeline(self.ref_model)
        if type(self.ref_model) is not type(self.model):
            raise ValueError(
                f"ref_model is a {type(self.ref_model).__name__} and model a {type(self.model).__name__}. Expected the same class"
            )
        if set(map(id, modules_of(self.ref_model).values())) & set(map(id, modules_of(self.model).values())):
            raise ValueError(
                "ref_model shares modules with model, which would train. Load it separately, or leave it out"
            )
        if self.config.tuning == "lora":
            raise ValueError(
                "ref_model has no use with a LoRA: the reference is the model without it. Leave it out, or set tuning='full'"
            )
        if self.config.reference not in ("auto", "frozen_copy"):
            raise ValueError(
                f"ref_model and reference {self.config.reference!r} exclude each other. Leave out one of them"
            )
