"""Files of trained vision-language models: an adapter in PEFT's format, or a whole model with its processor."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dpo_mm.errors import one_line
from dpo_mm.models.model_checks import SAVE_AGAIN, check_finite, name_model
from dpo_mm.models.model_loading import load_module, load_part
from dpo_mm.models.quantization import empty_model, refuse_whole_model
from dpo_mm.policies.adapter_checks import ADAPTER_FILE, ADAPTER_WEIGHTS, check_peft_adapter
from dpo_mm.policies.adapter_sources import START_FOLDER
from dpo_mm.policies.adapters import sort_sets
from dpo_mm.policies.lora_layers import FROZEN, TRAINED, merge_peft
from dpo_mm.policies.start_adapter import save_start
from dpo_mm.policies.vlm.architecture import auto_classes_for, unquantized_modules
from dpo_mm.policies.vlm.packed_attention import pack_vision_attention

if TYPE_CHECKING:
    from dpo_mm.policies.vlm.vlm_policy import VisionLanguage

TRIED_EDGE = 64
"""Pixels per edge of the image on which a processor is tried when it is loaded."""
PIXEL_LIMITS = ("min_pixels", "max_pixels")
"""Settings of processors that resize each image into a range of sizes, such as Qwen's."""
ADAPTER_NAMES = {"deepseek_ocr2": ("model.language_model.", "model.")}
"""By model type: the start of a weight's name, and the start in a saved adapter.

PEFT applies transformers' renaming of published weights to each adapter that it loads, also to names that are right
already. That of DeepSeek-OCR-2 turns `language_model.layers` into `language_model.language_model.layers`. From its
published name, `layers`, it gives the right one.
"""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def load(
    source: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: str | None,
    quantize: str | None,
    limits: Mapping[str, int | None],
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its processor before it.

    Args:
        source: folder or hub id.
        revision: a branch, tag or commit of a hub model.
        dtype: of all weights that are not quantised.
        device: cpu, cuda or cuda:1. None is the GPU if there is one.
        quantize: nf4, int8 or fp8 for the linear layers of the language model, without its head, or None.
        limits: see `load_processor`.

    Raises:
        ValueError: if the model is missing, incomplete or not supported.
    """
    from transformers import AutoConfig

    config = load_part(AutoConfig, source, name=f"model {source!r}", revision=revision)
    model_class, processor_class = auto_classes_for(config, source)
    processor = load_processor(processor_class, source, revision=revision, limits=limits)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype}
    if quantize:
        _, empty = empty_model(model_class, source, options)
        options |= {"quantize": quantize, "skip": list(unquantized_modules(empty)), "device": device}
    model = load_module(model_class, source, **options)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


def load_processor(
    processor_class: Any, source: str, *, revision: str | None = None, limits: Mapping[str, int | None] | None = None
) -> Any:
    """Load a model's processor or tokenizer.

    Args:
        processor_class: class of the processor.
        source: folder or hub id.
        revision: a branch, tag or commit of a hub model.
        limits: values of PIXEL_LIMITS by name. None: the processor's own.

    Raises:
        ValueError: if it is damaged, needs a package that is not installed, or has no limits of pixels.
    """
    given = {name: value for name, value in (limits or {}).items() if value is not None}
    processor = load_part(processor_class, source, name=f"model {source!r}: its processor", revision=revision, **given)
    if given:
        images = getattr(processor, "image_processor", None)
        known = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
        if unknown := set(given) - set(known):
            raise ValueError(
                f"{min(unknown)} has no effect: model {source!r} resizes images by its own rule ({type(images or processor).__name__}). "
                f"Remove {min(unknown)}"
            )
    return processor


def try_processor(policy: VisionLanguage) -> None:
    """Encode a short conversation, so that a damaged processor or tokenizer fails before any work.

    A ValueError is left for the rows: some models need an image, or take none.
    """
    images = [Image.new("RGB", (TRIED_EDGE, TRIED_EDGE))] if hasattr(policy.processor, "image_processor") else []
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "a"}]
    with contextlib.suppress(ValueError):
        try:
            policy.encoder.prompt(images, [{"role": "user", "content": content}], label="a row")
        except (TypeError, AttributeError, KeyError, IndexError, OverflowError, ZeroDivisionError) as error:
            reason = f"its processor is damaged ({one_line(error)}). {SAVE_AGAIN}"
            raise OSError(f"model {policy.source!r}: {reason}") from error


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
        policy.model.save_pretrained(
            folder, save_embedding_layers=False, state_dict=weights, selected_adapters=[TRAINED]
        )
        if names := ADAPTER_NAMES.get(policy.base_model.config.model_type):
            stored = load_file(folder / ADAPTER_WEIGHTS)
            save_file({name.replace(*names): tensor for name, tensor in stored.items()}, folder / ADAPTER_WEIGHTS)
        save_start(policy.config, folder)
    else:
        policy.model.save_pretrained(folder, state_dict=weights)
        policy.processor.save_pretrained(folder)


def load_weights(policy: VisionLanguage, folder: Path) -> None:
    """Load what `save` wrote into the prepared model.

    Raises:
        ValueError: if the weights do not fit the model, or an adapter has only pickled weights.
    """
    if hasattr(policy.model, "disable_adapter"):
        check_peft_adapter(folder, policy.base_model)
        from peft import load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(policy.model, weights)
        missing = [name for name in result.missing_keys if "lora_" in name and f".{FROZEN}" not in name]
        if result.unexpected_keys or missing:
            raise ValueError(f"{folder}: {(result.unexpected_keys + missing)[0]} does not fit this model's LoRA")
    else:
        stored = load_module(type(policy.model), str(folder))
        policy.model.load_state_dict(stored.state_dict())


def load_adapter(policy: VisionLanguage, folder: Path) -> None:
    """Load a trained adapter with PEFT, or a trained model with transformers, for generation.

    A model brings its own processor and chat template. If the folder has none, those of the base are used. An adapter below
    the trained one (START_FOLDER) is merged into the base first.

    Raises:
        ValueError: if the folder contains neither, or an adapter has only pickled weights.
    """
    if (folder / START_FOLDER).is_dir():
        load_adapter(policy, folder / START_FOLDER)
        policy.model = merge_peft(policy.model)
    base_model = policy.base_model
    if (folder / ADAPTER_FILE).exists():
        check_peft_adapter(folder, base_model)
        policy.model = _attach(base_model, folder).eval()
    elif (folder / "config.json").exists():
        refuse_whole_model(base_model, folder)
        policy.untuned = policy.model, policy.processor, policy.encoder
        tuned = load_module(type(base_model), str(folder), dtype=base_model.dtype)
        check_finite({"": tuned}, f"adapter {str(folder)!r}")
        pack_vision_attention(tuned)
        policy.model = tuned.to(base_model.device).eval()
        if any((folder / name).exists() for name in PROCESSOR_FILES):
            _, processor_class = auto_classes_for(tuned.config, str(folder))
            policy.processor = load_processor(processor_class, str(folder))
        policy.encoder = policy.encoder.with_processor(policy.processor, policy.model)
    else:
        raise ValueError(f"adapter {str(folder)!r} contains neither {ADAPTER_FILE} nor config.json")


def _attach(base_model: Any, folder: Path) -> Any:
    """Attach an adapter in PEFT's format to a model. Raises ValueError unless each of its weights fits the model."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
    from transformers.initialization import no_init_weights

    with name_model(f"adapter {str(folder)!r}"), no_init_weights():
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        model = peft_class(base_model, config)  # PeftModel.from_pretrained would not return the result of loading
        names = getattr(base_model, "_checkpoint_conversion_mapping", {})
        result: Any = model.load_adapter(str(folder), TRAINED, key_mapping=names)
    wrong = [*result.unexpected_keys, *result.missing_keys]
    if wrong:
        problem = "does not exist in this model" if result.unexpected_keys else "is missing in the adapter"
        raise ValueError(f"adapter {str(folder)!r}: the weight {wrong[0]} {problem}. Is it of another model?")
    return model
