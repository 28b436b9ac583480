"""Policies of models that the user has loaded: a transformers model with its processor, or a diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from dpo_mm.files.content_key import content_hash, plain_settings
from dpo_mm.models.model_checks import name_model
from dpo_mm.policies.adapters import pipeline_modules
from dpo_mm.policies.families import check_policy, pipeline_family, text_family
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    GivenModel = PreTrainedModel | DiffusionPipeline
    ProcessingClass = ProcessorMixin | PreTrainedTokenizerBase


def is_pipeline(model: object) -> bool:
    """Return True for a diffusers pipeline, False for a transformers model.

    Raises:
        ValueError: if it is neither, or has an adapter already.
    """
    from diffusers import DiffusionPipeline
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, str):
        raise ValueError(
            f"model is the text {model!r}. Load it first, for example with from_pretrained, or train by name: "
            "dpo_mm.train(TrainConfig(...))"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel. Give the model below it, and the adapter's folder as the setting adapter"
        )
    if not isinstance(model, PreTrainedModel | DiffusionPipeline):
        raise ValueError(
            f"model is a {type(model).__name__}. Expected a model of transformers or a pipeline of diffusers"
        )
    _refuse_adapter(model)
    return isinstance(model, DiffusionPipeline)


def _refuse_adapter(model: GivenModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in modules_of(model).values():
        if any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
            raise ValueError(
                "model has an adapter already, maybe from an earlier DPOTrainer. Load the model again, or remove it: "
                "pipe.unload_lora_weights(), or model = trainer.model.unload()"
            )


def modules_of(model: GivenModel) -> dict[str, torch.nn.Module]:
    """Return the modules of a pipeline by name, or the model itself under the name ""."""
    if isinstance(model, torch.nn.Module):
        return {"": model}
    return pipeline_modules(model)


def given_name(model: GivenModel) -> str:
    """Return the folder or hub id from which a model was loaded, or the name of its class if it was made in memory."""
    return str(getattr(model, "name_or_path", None) or type(model).__name__)


def given_content(model: GivenModel, processing_class: ProcessingClass | None) -> str:
    """Return a hash of a model's weights and configuration, and of its processor."""
    if isinstance(model, torch.nn.Module):
        return content_hash([model, processing_class])
    pipe: Any = model
    return content_hash([type(pipe).__name__, {**pipe.components}, plain_settings(dict(pipe.config))])


def text_policy(
    model: PreTrainedModel, processing_class: ProcessingClass | None, options: Mapping[str, Any]
) -> TextPolicy:
    """Make a policy of a transformers model. The model moves to the GPU if there is one.

    Args:
        model: the model.
        processing_class: its processor, or its tokenizer if it takes no images.
        options: as in `policy_options`.

    Raises:
        ValueError: if the model is not supported, or the processor is not one.
    """
    from dpo_mm.policies.vlm.model_files import try_processor

    name = given_name(model)
    check_processing_class(model, processing_class)
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    with name_model(f"model {name!r}"):
        policy = text_family()(model.eval(), processing_class, name, **options)
        try_processor(policy)
        check_policy(policy, name)
    return cast(TextPolicy, policy)


def check_processing_class(model: PreTrainedModel, processing_class: object) -> None:
    """Check that a model is supported and has the processor that it needs. Raises ValueError."""
    from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

    from dpo_mm.policies.vlm.architecture import auto_classes_for

    _, wanted = auto_classes_for(model.config, given_name(model))
    kinds = ProcessorMixin if wanted is AutoProcessor else (PreTrainedTokenizerBase, ProcessorMixin)
    if not isinstance(processing_class, kinds):
        given = "is missing" if processing_class is None else f"is a {type(processing_class).__name__}"
        takes = "its processor" if wanted is AutoProcessor else "its tokenizer"
        raise ValueError(
            f"processing_class {given}. {type(model).__name__} needs {takes}: {wanted.__name__}.from_pretrained(...)"
        )


def image_policy(pipe: DiffusionPipeline, options: Mapping[str, Any]) -> ImagePolicy:
    """Make a policy of a copy of a diffusers pipeline that shares its components.

    They move to the CPU, and from there to the GPU when they are needed. The policy releases encoders in the copy only.

    Args:
        pipe: the pipeline.
        options: as in `policy_options`.

    Raises:
        ValueError: if no family supports the pipeline, or a component is missing.
    """
    from dpo_mm.policies.diffusion.of_pipeline import policy_of_pipeline

    family, name = pipeline_family(pipe), given_name(pipe)
    missing = [part for part in family.required_components if getattr(pipe, part, None) is None]
    if missing:
        raise ValueError(f"model {name!r} has no {missing[0]}. Load the whole pipeline")
    if getattr(pipe, "_all_hooks", None):
        raise ValueError(f"model {name!r} moves its parts by itself (enable_model_cpu_offload). Load it without")
    with name_model(f"model {name!r}"):
        policy = cast(ImagePolicy, policy_of_pipeline(family, copy.copy(pipe), name, one_at_a_time=True, **options))
        check_policy(policy, name)
    return policy
