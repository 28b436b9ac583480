"""Pipelines for Stable Diffusion and SDXL in one .safetensors file, in the layout of the original code.

Such a file has no configs and no tokenizers. They are read from the folder next to it with its name without .safetensors, or from
the Hugging Face cache. Nothing is downloaded. The pipeline is converted by diffusers once, into the cache, and opened from there
like any other.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dpo_mm.files.cache_folder import cache_folder, create_cache
from dpo_mm.files.content_key import content_hash, file_hash, library_versions
from dpo_mm.files.resumable import explain_unwritten, temporary_path
from dpo_mm.models.model_checks import check_safetensors, name_model, read_config

UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
SDXL_KEY = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
USUAL_CONFIGS = {
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0",
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
"""Pipeline classes of single files, and the repository with the usual configs of each."""
CONFIG_SUFFIXES = (".json", ".txt")


def is_single_file(model: str) -> bool:
    """Return True if a model is one file of weights."""
    return model.endswith(".safetensors") and Path(model).is_file()


def config_folder(model: str) -> Path:
    """Return the folder with the configs of a single file.

    Raises:
        ValueError: if the file has no UNet, or there are no configs on this machine. The error says where to put them.
    """
    from huggingface_hub import try_to_load_from_cache

    file, folder = Path(model), Path(model).with_suffix("")
    if (folder / "model_index.json").is_file():
        name = _pipeline_name(folder)
        if name not in USUAL_CONFIGS:
            raise ValueError(
                f"model {model!r}: {folder} has configs of a {name}. Expected {' or '.join(USUAL_CONFIGS)}"
            )
        return folder
    names = _tensor_names(file)
    if UNET_KEY not in names:
        raise ValueError(f"model {model!r} has no {UNET_KEY}. Expected a whole Stable Diffusion 1.5 or SDXL checkpoint")
    usual = USUAL_CONFIGS["StableDiffusionXLPipeline" if SDXL_KEY in names else "StableDiffusionPipeline"]
    cached = try_to_load_from_cache(usual, "model_index.json")
    if not isinstance(cached, str):
        raise ValueError(
            f"model {model!r}: the configs of its pipeline are not on this machine. Put model_index.json and the folders with the "
            f"configs and tokenizers into {folder}, or run: hf download {usual} --include '*.json' '*.txt'"
        )
    return Path(cached).parent


def load_line(model: str, dtype: object) -> str:
    """Return the line of Python that loads a pipeline as `pipe` with diffusers."""
    if not is_single_file(model):
        return f'pipe = DiffusionPipeline.from_pretrained("{model}", dtype={dtype})'
    configs = config_folder(model)
    return f'pipe = {_pipeline_name(configs)}.from_single_file("{model}", config="{configs}", dtype={dtype})'


def _pipeline_name(configs: Path) -> str:
    return str(read_config(configs / "model_index.json", fix="Copy the configs again").get("_class_name"))


def single_file_content(model: str) -> str:
    """Return a hash of a single file and of its configs."""
    configs = config_folder(model)
    files = sorted(path for path in configs.rglob("*") if path.suffix in CONFIG_SUFFIXES and path.is_file())
    return content_hash([file_hash(Path(model)), {str(path.relative_to(configs)): file_hash(path) for path in files}])


def converted_folder(model: str) -> str:
    """Convert a single file to a pipeline folder in the cache, unless it is there, and return the folder.

    Raises:
        ValueError: if the file or a config is damaged, or a weight is missing.
        OSError: if the cache cannot be written.
    """
    from filelock import FileLock

    check_safetensors(Path(model))
    folder = cache_folder() / "single-files" / content_hash([single_file_content(model), library_versions()])
    create_cache(folder.parent)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with name_model(f"model {model!r}"):
                pipe = _load(model)
            aside = temporary_path(folder)
            try:
                with explain_unwritten(folder, fix="Free space, or set DPO_MM_CACHE to a folder with more"):
                    pipe.save_pretrained(aside)
                    os.replace(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return str(folder)


def _load(model: str) -> Any:
    """Load the pipeline in the precision of the file, and check that every weight was in it."""
    import diffusers
    import torch
    from safetensors import safe_open

    configs = config_folder(model)
    name = _pipeline_name(configs)
    with safe_open(model, "pt") as weights:
        kind = weights.get_slice(UNET_KEY).get_dtype()
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    options: dict[str, Any] = {"config": str(configs), "local_files_only": True, "dtype": dtype}
    parts = {"safety_checker": None, "feature_extractor": None} if name == "StableDiffusionPipeline" else {}
    try:
        pipe = getattr(diffusers, name).from_single_file(model, **options, **parts)
    except NotImplementedError as error:  # a tensor that was not in the file has no number to move
        raise ValueError(f"model {model!r} has no weight for a layer in {configs}. Download it again") from error
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            missing = [tensor for tensor, value in module.state_dict().items() if value.is_meta]
            if missing:
                raise ValueError(f"model {model!r} has no weight {missing[0]} of its {part}. Download it again")
    return pipe


def _tensor_names(file: Path) -> set[str]:
    from safetensors import safe_open

    check_safetensors(file)
    with safe_open(str(file), "pt") as weights:
        return set(weights.keys())
