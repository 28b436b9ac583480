"""Which file makes a policy of a model: one row per model family."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from dpo_mm.assets import resolve_asset
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "dpo_mm.policies.diffusion.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "dpo_mm.policies.diffusion.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "dpo_mm.policies.diffusion.sd3:StableDiffusion3",
    "FluxPipeline": "dpo_mm.policies.diffusion.flux:Flux",
    "FluxKontextPipeline": "dpo_mm.policies.diffusion.flux_kontext:FluxKontext",
    "PixArtSigmaPipeline": "dpo_mm.policies.diffusion.pixart_sigma:PixArtSigma",
    "SanaPipeline": "dpo_mm.policies.diffusion.sana:Sana",
    "QwenImagePipeline": "dpo_mm.policies.diffusion.qwen_image:QwenImage",
    "ZImagePipeline": "dpo_mm.policies.diffusion.z_image:ZImage",
    "Flux2KleinPipeline": "dpo_mm.policies.diffusion.flux2:Flux2Klein",
}
"""Pipeline class, as its model_index.json names it, to the class that makes it a policy."""


VLM_POLICY = "dpo_mm.policies.vlm.vlm_policy:VisionLanguage"
"""What makes a policy of a transformers model: a folder or hub id with a config.json and no model_index.json."""


def _index(model: str, file: str, revision: str | None) -> Path | None:
    """A model's index file, from its folder or the hub; None where it has none."""
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        path = Path(model) / file
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, file, revision=revision))
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise ValueError(
            f"model {model!r}: neither a folder nor reachable on the hub ({type(error).__name__})"
        ) from error


def resolve_commit(model: str, *, revision: str | None = None) -> str | None:
    """The commit of a hub model that is read where `revision` is asked for; None for a folder."""
    index = _index(model, "model_index.json", revision) or _index(model, "config.json", revision)
    parts = index.parts if index else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def policy_path_for(model: str, *, revision: str | None = None) -> str:
    """Where the class stands that makes a policy of a model, as module:class, by the model's own index.

    Raises ValueError where there is no index or the family is unknown.
    """
    index = _index(model, "model_index.json", revision)
    if index is None:
        if _index(model, "config.json", revision):
            return VLM_POLICY
        raise ValueError(
            f"model {model!r}: neither model_index.json (a diffusers pipeline) nor config.json (a transformers model) there"
        )
    name = json.loads(index.read_text()).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"model {model!r} is a {name}, which no family handles yet; known: {', '.join(FAMILIES)}. "
            "A family is one file: see 'Add an image family' in the documentation"
        )
    return FAMILIES[name]


def policy_class(model: str, *, revision: str | None = None) -> Any:
    """The class that makes a policy of a model. Raises ValueError as `policy_path_for`."""
    module, _, name = policy_path_for(resolve_asset(model), revision=revision).partition(":")
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
        device: cpu, cuda or cuda:1. None takes the GPU if there is one.
        adapter: folder of a trained adapter or model, or the name of a bundled one, to generate with.
        **options: further arguments of the class's `load`.

    Raises:
        ValueError: if the model is missing, incomplete or of an unknown family, or the adapter does not fit.
    """
    cls = policy_class(model, revision=revision)
    policy: ImagePolicy | TextPolicy = cls.load(
        resolve_asset(model), revision=revision, precision=precision, device=device, **options
    )
    if adapter:
        policy.load_adapter(Path(resolve_asset(str(adapter))).absolute())
    return policy


def load_image_policy(model: str, *, revision: str | None = None, **options: Any) -> ImagePolicy:
    """Load an image generator. See `load_policy`. Raises ValueError for a language model, before loading it."""
    if policy_class(model, revision=revision).modality != "image":
        raise ValueError(
            f"model {model!r} generates text; expected an image generator (a folder with model_index.json)"
        )
    policy = load_policy(model, revision=revision, **options)
    assert policy.modality == "image"
    return policy


def load_text_policy(model: str, *, revision: str | None = None, **options: Any) -> TextPolicy:
    """Load a vision-language model. See `load_policy`. Raises ValueError for an image generator, before loading it."""
    if policy_class(model, revision=revision).modality != "text":
        raise ValueError(f"model {model!r} generates images; expected a vision-language or language model")
    policy = load_policy(model, revision=revision, **options)
    assert policy.modality == "text"
    return policy
