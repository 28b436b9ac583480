"""Files of trained vision-language models: an adapter in PEFT's format, or a whole model with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpo_mm.model_loading import load_module
from dpo_mm.policies.adapters import refuse_pickle, sort_sets
from dpo_mm.policies.vlm.architecture import auto_classes_for

if TYPE_CHECKING:
    from dpo_mm.policies.vlm.vlm_policy import VisionLanguage

ADAPTER_FILE = "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def load_processor(processor_class: Any, source: str, *, revision: str | None = None) -> Any:
    """Load a model's processor or tokenizer. Raises ValueError if it needs a package that is not installed."""
    try:
        return processor_class.from_pretrained(source, revision=revision)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {source!r}: its processor needs a package that is not installed. {reason}") from error


def save(policy: VisionLanguage, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
    """Write the adapter in PEFT's format, or the whole model with its processor.

    Args:
        policy: a prepared policy.
        folder: an existing folder.
        weights: the gathered state, if the model's own is sharded over several processes.
    """
    if hasattr(policy.model, "disable_adapter"):
        policy.model.active_peft_config.base_model_name_or_path = policy.config.model
        sort_sets(policy.model.active_peft_config)
        policy.model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
    else:
        policy.model.save_pretrained(folder, state_dict=weights)
        policy.processor.save_pretrained(folder)


def load_weights(policy: VisionLanguage, folder: Path) -> None:
    """Load what `save` wrote into the prepared model.

    Raises:
        ValueError: if the weights do not fit the model, or an adapter has only pickled weights.
    """
    if hasattr(policy.model, "disable_adapter"):
        refuse_pickle(folder)
        from peft import load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(policy.model, weights)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if result.unexpected_keys or missing:
            raise ValueError(f"{folder}: {(result.unexpected_keys + missing)[0]} does not fit this model's LoRA")
    else:
        stored = load_module(type(policy.model), str(folder))
        policy.model.load_state_dict(stored.state_dict())


def load_adapter(policy: VisionLanguage, folder: Path) -> None:
    """Load a trained adapter with PEFT, or a trained model with transformers, for generation.

    A model brings its own processor and chat template. If the folder has none, those of the base are used.

    Raises:
        ValueError: if the folder contains neither, or an adapter has only pickled weights.
    """
    base_model = policy.base_model
    if (folder / ADAPTER_FILE).exists():
        refuse_pickle(folder)
        from peft import PeftModel

        policy.model = PeftModel.from_pretrained(base_model, str(folder)).eval()
    elif (folder / "config.json").exists():
        policy.untuned = policy.model, policy.processor, policy.encoder
        tuned = load_module(type(base_model), str(folder), dtype=base_model.dtype)
        policy.model = tuned.to(base_model.device).eval()
        if any((folder / name).exists() for name in PROCESSOR_FILES):
            _, processor_class = auto_classes_for(tuned.config, str(folder))
            policy.processor = load_processor(processor_class, str(folder))
        policy.encoder = policy.encoder.with_processor(policy.processor, policy.model)
    else:
        raise ValueError(f"adapter {str(folder)!r} contains neither {ADAPTER_FILE} nor config.json")
