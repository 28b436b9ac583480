"""Table of model families, and loading a model as the policy of its family."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from dpo_mm.assets import resolve_asset
from dpo_mm.files.checksums import check_trained_files
from dpo_mm.files.content_key import model_files_hash
from dpo_mm.models.model_checks import SAVE_AGAIN, check_finite, check_folder, name_model, read_config
from dpo_mm.models.quantization import check_quantize
from dpo_mm.policies.adapter_sources import find_adapter
from dpo_mm.policies.adapters import pipeline_modules
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.policies.single_file import config_folder, converted_folder, is_single_file, single_file_content

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "dpo_mm.policies.diffusion.stable_diffusion:StableDiffusion",
    "StableDiffusionInstructPix2PixPipeline": "dpo_mm.policies.diffusion.instruct_pix2pix:InstructPix2Pix",
    "StableDiffusionXLPipeline": "dpo_mm.policies.diffusion.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "dpo_mm.policies.diffusion.sd3:StableDiffusion3",
    "FluxPipeline": "dpo_mm.policies.diffusion.flux:Flux",
    "FluxKontextPipeline": "dpo_mm.policies.diffusion.flux_kontext:FluxKontext",
    "ChromaPipeline": "dpo_mm.policies.diffusion.chroma:Chroma",
    "PixArtSigmaPipeline": "dpo_mm.policies.diffusion.pixart_sigma:PixArtSigma",
    "SanaPipeline": "dpo_mm.policies.diffusion.sana:Sana",
    "QwenImagePipeline": "dpo_mm.policies.diffusion.qwen_image:QwenImage",
    "QwenImage21Pipeline": "dpo_mm.policies.diffusion.qwen_image21:QwenImage21",
    "LongCatImagePipeline": "dpo_mm.policies.diffusion.longcat_image:LongCatImage",
    "ErnieImagePipeline": "dpo_mm.policies.diffusion.ernie_image:ErnieImage",
    "QwenImageEditPlusPipeline": "dpo_mm.policies.diffusion.qwen_image_edit:QwenImageEdit",
    "Krea2Pipeline": "dpo_mm.policies.diffusion.krea2:Krea2",
    "HiDreamImagePipeline": "dpo_mm.policies.diffusion.hidream:HiDream",
    "WanPipeline": "dpo_mm.policies.diffusion.wan:Wan",
    "ZImagePipeline": "dpo_mm.policies.diffusion.z_image:ZImage",
    "Flux2Pipeline": "dpo_mm.policies.diffusion.flux2:Flux2",
    "Flux2KleinPipeline": "dpo_mm.policies.diffusion.flux2:Flux2",
}
"""Policy class of each pipeline class, as module:class. The key is `_class_name` of the pipeline's model_index.json."""


MOST_PADDING, MOST_PIXELS = 10_000, 16_384
"""Largest length to which prompts are padded, and largest resolution of a model."""
VLM_POLICY = "dpo_mm.policies.vlm.vlm_policy:VisionLanguage"
"""Policy class of a transformers model: a folder or hub id with a config.json and without a model_index.json."""


def _index(model: str, file: str, revision: str | None, *, is_last: bool = False) -> Path | None:
    """Find a model's index file in its folder or on the hub. None if there is no such file, or if it is not the last and not cached."""
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        path = Path(model) / file
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, file, revision=revision))
    except EntryNotFoundError as error:
        if is_last and isinstance(error, LocalEntryNotFoundError):
            raise ValueError(
                f"model {model!r} is neither a folder nor reachable on the hub, and it is not in the hub's cache. "
                "Check its name, the network and HF_HUB_OFFLINE"
            ) from error
        return None
    except Exception as error:
        raise ValueError(
            f"model {model!r} is neither a folder nor reachable on the hub ({type(error).__name__})"
        ) from error


def resolve_commit(model: str, *, revision: str | None = None) -> str | None:
    """Return the commit of a hub model at a revision, or None for a folder.

    Args:
        model: a folder or hub id.
        revision: a branch, tag or commit. None is the default branch.

    Raises:
        ValueError: if the model is neither a folder nor reachable on the hub.
    """
    index = _index(model, "model_index.json", revision) or _index(model, "config.json", revision)
    parts = index.parts if index else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def model_content(model: str, *, revision: str | None = None) -> str:
    """Return what identifies a model's or an adapter's files: the commit on the hub, or a hash of the folder's files.

    Args:
        model: a folder, a hub id, or the name of a bundled model.
        revision: a branch, tag or commit of a hub model.

    Raises:
        ValueError: if it is neither a folder nor reachable on the hub.
    """
    folder = Path(resolve_asset(model))
    if is_single_file(str(folder)):
        return single_file_content(str(folder))
    return model_files_hash(folder) if folder.is_dir() else resolve_commit(model, revision=revision) or ""


def policy_path_for(model: str, *, revision: str | None = None) -> str:
    """Return the policy class of a model as module:class, according to the model's index file.

    Args:
        model: a folder or hub id.
        revision: a branch, tag or commit of a hub model.

    Raises:
        ValueError: if the model has no index file or its family is unknown.
    """
    if is_single_file(model):
        index: Path | None = config_folder(model) / "model_index.json"
    else:
        index = _index(model, "model_index.json", revision)
    if index is None:
        if Path(model).suffix == ".ckpt":
            raise ValueError(f"model {model!r} is a pickle, which is not read. Take its .safetensors file")
        if _index(model, "config.json", revision, is_last=True):
            return VLM_POLICY
        if not Path(model).exists() and model.count("/") != 1:
            raise ValueError(f"model {model!r} does not exist. Expected a folder, a safetensors file or a hub id")
        raise ValueError(
            f"model {model!r} has neither model_index.json (a diffusers pipeline) nor config.json (a transformers model)"
        )
    content = read_config(index, fix=SAVE_AGAIN)
    name = content.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"{index}: _class_name is {name!r:.120}. Expected the name of a class of diffusers, because code of models is not run"
        )
    if name not in FAMILIES and (code := sorted(file.name for file in index.parent.glob("*.py"))):
        raise ValueError(f"model {model!r} is a {name} with custom code ({code[0]}), and code of models is not run")
    return _family_path(name, model)


def _family_path(pipeline: str, model: str) -> str:
    """Policy class of a pipeline class, as module:class. Raises ValueError if no family supports it."""
    if pipeline not in FAMILIES:
        raise ValueError(
            f"model {model!r} is a {pipeline}, which no family supports yet. Known: {', '.join(FAMILIES)}. "
            "A new family is one file: see 'Add an image family' in the documentation"
        )
    return FAMILIES[pipeline]


def policy_class(model: str, *, revision: str | None = None) -> Any:
    """Import the policy class of a model.

    Args:
        model: a folder, a hub id, or the name of a bundled model.
        revision: a branch, tag or commit of a hub model.

    Raises:
        ValueError: if the model has no index file or its family is unknown.
    """
    return _import_class(policy_path_for(resolve_asset(model), revision=revision))


def pipeline_family(pipe: object) -> Any:
    """Import the policy class of a pipeline of diffusers. Raises ValueError if no family supports it."""
    name = type(pipe).__name__
    return _import_class(_family_path(name, name))


def text_family() -> Any:
    """Import the policy class of transformers models."""
    return _import_class(VLM_POLICY)


def _import_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def load_policy(
    model: str,
    *,
    revision: str | None = None,
    precision: str = "fp32",
    device: str | None = None,
    adapter: str | Path | None = None,
    **options: Any,
) -> ImagePolicy | TextPolicy:
    """Load a model as a policy, with the class that its family names.

    Args:
        model: a folder, a hub id, or the name of a bundled model.
        revision: a branch, tag or commit of a hub model.
        precision: fp32, bf16 or fp16.
        device: cpu, cuda or cuda:1. None is the GPU if there is one.
        adapter: a trained adapter or model: a folder, the name of a bundled one, a LoRA's safetensors file, or a hub id.
        **options: further arguments of the policy class's `load`, such as quantize.

    Raises:
        ValueError: if the model is missing, incomplete or of an unknown family, or the adapter does not fit.
    """
    cls, source = policy_class(model, revision=revision), resolve_asset(model)
    if is_single_file(source):
        source = converted_folder(source)
    check_quantize(options.get("quantize"), device=device)
    if Path(source).is_dir():
        check_folder(Path(source))
    check_trained_files(Path(source))
    with name_model(f"model {model!r}"):
        policy: ImagePolicy | TextPolicy = cls.load(
            source, revision=revision, precision=precision, device=device, **options
        )
        check_policy(policy, model)
    if adapter:
        folder = find_adapter(adapter)
        check_trained_files(folder)
        with name_model(f"adapter {str(adapter)!r}"):
            policy.load_adapter(folder)
    return policy


def check_policy(policy: ImagePolicy | TextPolicy, model: str) -> None:
    """Check the weights of a policy and, for an image generator, its tokenizers and its resolution.

    Args:
        policy: the policy.
        model: name of its model, for errors.

    Raises:
        ValueError: if a weight is not finite, or a tokenizer or the resolution is damaged.
    """
    check_finite(_modules(policy), f"model {model!r}")
    if policy.modality == "image":
        _try_tokenizers(policy, model)
        _check_resolution(policy, model)


def _try_tokenizers(policy: ImagePolicy, model: str) -> None:
    """Check the tokenizers of a pipeline, so that damaged ones fail before any work.

    Raises:
        ValueError: if a length is not a moderate number, or a text encoder does not know a token.
    """
    from transformers import PreTrainedTokenizerBase

    for name, part in policy.pipe.components.items():
        if isinstance(part, PreTrainedTokenizerBase):
            length = part.model_max_length
            pads = "CLIP" in type(part).__name__  # pipelines pad its prompts to this length
            if not isinstance(length, int | float) or not length >= 1 or (pads and length > MOST_PADDING):
                raise ValueError(
                    f"model {model!r}, {name}: model_max_length is {length!r:.40}. Download the model again"
                )
            ids = part(["a"]).input_ids[0]
            encoder: Any = policy.pipe.components.get(name.replace("tokenizer", "text_encoder"))
            known = encoder.get_input_embeddings().num_embeddings if encoder is not None else max(ids) + 1
            if max(ids) >= known:
                raise ValueError(
                    f"model {model!r}, {name}: has the token {max(ids)}, but its text encoder knows {known}. Download the model again"
                )


def _check_resolution(policy: ImagePolicy, model: str) -> None:
    """Raise ValueError if a pipeline's resolution is not a moderate whole number."""
    if type(policy.resolution) is not int or not 1 <= policy.resolution <= MOST_PIXELS:
        raise ValueError(
            f"model {model!r}: its images have {policy.resolution!r:.40} pixels per edge. Expected 1 to {MOST_PIXELS}. Download "
            "the model again"
        )


def _modules(policy: ImagePolicy | TextPolicy) -> dict[str, nn.Module]:
    """Modules of a policy by name: those of its pipeline, or its model."""
    if policy.modality == "text":
        return {"": policy.model}
    return pipeline_modules(policy.pipe)  # type: ignore[attr-defined]


def load_image_policy(model: str, *, revision: str | None = None, **options: Any) -> ImagePolicy:
    """Load an image generator.

    Args:
        model: as in `load_policy`.
        revision: as in `load_policy`.
        **options: further arguments of `load_policy`.

    Raises:
        ValueError: if the model is a language model (before it is loaded), and as in `load_policy`.
    """
    if policy_class(model, revision=revision).modality != "image":
        raise ValueError(
            f"model {model!r} generates text. Expected an image generator (a folder with model_index.json)"
        )
    policy = load_policy(model, revision=revision, **options)
    assert policy.modality == "image"
    return policy


def load_text_policy(model: str, *, revision: str | None = None, **options: Any) -> TextPolicy:
    """Load a vision-language model, or a language model without images.

    Args:
        model: as in `load_policy`.
        revision: as in `load_policy`.
        **options: further arguments of `load_policy`.

    Raises:
        ValueError: if the model is an image generator (before it is loaded), and as in `load_policy`.
    """
    if policy_class(model, revision=revision).modality != "text":
        raise ValueError(f"model {model!r} generates images. Expected a vision-language or language model")
    policy = load_policy(model, revision=revision, **options)
    assert policy.modality == "text"
    return policy
