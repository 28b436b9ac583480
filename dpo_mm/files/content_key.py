"""Keys of stored work: a hash of everything that decides its content.

Work that is stored to be used again, or to be resumed, has a key. The key has every ingredient that INGREDIENTS lists for
that kind of work. A change of any of them gives new work, or refuses to go on with the old.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

INGREDIENTS: dict[str, tuple[str, ...]] = {
    "encoded pairs": ("encoders", "rows", "sizes", "precision", "libraries"),
    "lengths of rows": ("model", "rows", "settings", "example", "libraries"),
    "vision features": ("model", "adapter", "rows", "settings", "device", "libraries"),
    "reference log-probs": ("model", "adapter", "rows", "settings", "device", "libraries"),
    "training run": ("settings", "pairs", "encoded rows", "model", "adapter", "libraries"),
    "mined image pairs": ("settings", "model", "adapter", "prompts", "judges", "libraries"),
    "mined response pairs": ("settings", "model", "adapter", "questions", "judges", "libraries"),
    "scores of images": ("settings", "images", "judges", "libraries"),
    "relabelled pairs": ("settings", "images", "judges", "libraries"),
    "comparison": ("settings", "model", "adapters", "prompts", "judges", "libraries"),
    "image of a comparison": (
        "weights",
        "scale",
        "scheduler",
        "steps",
        "guidance",
        "size",
        "dtype",
        "device",
        "libraries",
        "batch",
    ),
    "response of a comparison": (
        "weights",
        "generation",
        "max_new_tokens",
        "temperature",
        "seed",
        "dtype",
        "device",
        "libraries",
        "batch",
    ),
    "response of a server": ("served", "adapter", "max_new_tokens", "temperature", "seed", "question"),
    "reply of a judge": ("model", "messages", "sampling"),
    "score of a comparison": ("judge", "image", "prompt"),
    "images to label": ("settings", "models", "prompts", "libraries"),
}
"""What decides the content of each kind of stored work.

Settings are those of the command. `encoders`, `model` and `weights` contain configurations, tokenizers, chat templates and
processors. Dataset, images, prompts and questions count by their content, not by their path. Judges count by their cards.
"""
LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "peft", "tokenizers", "numpy", "pillow")
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".py")
"""Ends of the names of files that decide what a model computes. Others are pages and pictures about it."""
RECORDS_OF_TRAINING = ("complete.json", "dpo_mm.json", "training_log.json")
"""Files that training writes next to weights. A comparison changes the first, when it adds its results to the model card."""
LOCATIONS = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "_diffusers_version")
"""Entries of configurations that say where or by which release a model was saved."""


def content_key(kind: str, parts: Mapping[str, Any]) -> str:
    """Hash the ingredients of one piece of work, 32 hex digits.

    Args:
        kind: a key of INGREDIENTS.
        parts: value of each ingredient, see `content_hash`.
    """
    check_ingredients(kind, parts)
    return content_hash({"kind": kind, **parts})


def check_ingredients(kind: str, parts: Mapping[str, Any]) -> None:
    """Check that all ingredients of a kind are there, and no other."""
    assert set(parts) == set(INGREDIENTS[kind]), (kind, set(parts) ^ set(INGREDIENTS[kind]))


@functools.cache
def library_versions() -> str:
    """Versions of dpo-mm and of the libraries that decide numbers, as one line."""
    from dpo_mm import __version__

    return ", ".join([f"dpo-mm {__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)])


def content_hash(value: Any) -> str:
    """Hash a value by its content, 32 hex digits. Names of folders do not count.

    Args:
        value: plain values, bytes, mappings, sequences, arrays, tensors, images, and models, tokenizers, processors and
            configurations of diffusers and transformers, nested in any way.

    Raises:
        TypeError: if the content of a value is unknown.
    """
    digest = xxhash.xxh3_128()
    _add(digest, value)
    return digest.hexdigest()


def lora_scales(model: Any) -> dict[str, Any]:
    """Rank and alpha of each LoRA layer of a model, which its weights do not contain."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_alpha")}
    return {name: [dict(layer.r), dict(layer.lora_alpha), dict(layer.use_rslora)] for name, layer in layers.items()}


def _add(digest: Any, value: Any) -> None:
    """Add a value to a hash, with its type and length before it, so that no two values look alike."""
    import numpy as np

    if value is None or isinstance(value, bool | int | float | str | Path | np.generic):
        text = f"{value!r}" if not isinstance(value, str | Path) else str(value)
        _add_bytes(digest, f"{'text' if isinstance(value, str) else 'value'}", text.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray | memoryview):
        _add_bytes(digest, "bytes", value)
    elif hasattr(value, "__tensor_flatten__"):  # a quantised tensor
        names, _ = value.__tensor_flatten__()
        _add(digest, {"class": type(value).__name__, **{name: getattr(value, name) for name in names}})
    elif hasattr(value, "detach"):  # a tensor; its bytes, because numpy has no bfloat16
        import torch

        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        _add_bytes(digest, f"tensor {value.dtype} {tuple(value.shape)}", flat.data)
    elif isinstance(value, np.ndarray):
        _add_bytes(digest, f"array {value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _add_bytes(digest, f"mapping {len(value)}", b"")
        for name in sorted(value, key=str):
            _add(digest, name)
            _add(digest, value[name])
    elif isinstance(value, set | frozenset):
        _add(digest, sorted(value, key=str))
    elif isinstance(value, Sequence):
        _add_bytes(digest, f"sequence {len(value)}", b"")
        for part in value:
            _add(digest, part)
    elif hasattr(value, "tobytes"):  # an image
        _add_bytes(digest, f"image {value.mode} {value.size}", value.tobytes())
    else:
        _add(digest, _parts_of(value))


def _add_bytes(digest: Any, kind: str, data: Any) -> None:
    digest.update(f"{kind} {len(data)}\0".encode())
    digest.update(data)


def _parts_of(value: Any) -> dict[str, Any]:
    """Content of a model, a tokenizer, a processor or a configuration as plain values."""
    parts: dict[str, Any] = {"class": type(value).__name__}
    if hasattr(value, "get_vocab"):
        return parts | _tokenizer_parts(value)
    if hasattr(value, "state_dict") and hasattr(value, "parameters"):
        parts |= {"weights": dict(value.state_dict()), "scales": lora_scales(value)}
    if hasattr(value, "to_dict"):
        parts |= {"settings": plain_settings(value.to_dict())}
    elif hasattr(value, "config"):
        parts |= {"settings": plain_settings(getattr(value.config, "to_dict", lambda: dict(value.config))())}
    for name in ("tokenizer", "image_processor", "video_processor", "feature_extractor", "chat_template"):
        if getattr(value, name, None) is not None:
            parts[name] = getattr(value, name)
    if len(parts) == 1:
        raise TypeError(f"content of a {type(value).__name__} is unknown")
    return parts


def _tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, rules, special tokens and template of a tokenizer, without what the last call left in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    names = ("special_tokens_map", "model_max_length", "padding_side", "truncation_side", "chat_template")
    return {"class": type(tokenizer).__name__} | {
        "rules": {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")},
        **{name: plain_settings(getattr(tokenizer, name, None)) for name in names},
        "begin and end": plain_settings(
            [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
        ),
    }


def plain_settings(value: Any) -> Any:
    """Configuration as JSON values, without where it was saved."""
    text = json.dumps(value, sort_keys=True, default=str, skipkeys=True)
    return json.loads(text, object_hook=lambda entry: {k: v for k, v in entry.items() if k not in LOCATIONS})


def file_hash(path: Path) -> str:
    """Hash the bytes of a file, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def model_files_hash(folder: Path) -> str:
    """Hash the files of a model or an adapter that decide what it computes. Checkpoints inside do not count."""
    inside = [*folder.glob("*/*config*.json"), *folder.glob("*/*.safetensors")]
    parts = [path.parent for path in inside if not path.parent.name.startswith("checkpoint-")]
    listed = (path for part in {folder, *parts} for path in part.iterdir())
    files = [
        path
        for path in listed
        if path.suffix in MODEL_FILES and path.name not in RECORDS_OF_TRAINING and path.is_file()
    ]
    return content_hash({str(path.relative_to(folder)): file_hash(path) for path in files})
