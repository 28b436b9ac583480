"""Find the files of an adapter: a folder of PEFT's or diffusers', a safetensors file such as kohya's, or a repository on the hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from dpo_mm.assets import resolve_asset
from dpo_mm.files.content_key import file_hash, model_files_hash
from dpo_mm.policies.adapter_checks import ADAPTER_FILE, ADAPTER_WEIGHTS
from dpo_mm.policies.adapters import LORA_FILE

START_FOLDER = "start_adapter"
"""Subfolder of a stacked adapter with the adapter below it."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DOWNLOADED = ["*.safetensors", "*.json"]


def find_adapter(name: str | Path) -> Path:
    """Return the folder or the safetensors file of an adapter. A hub id is downloaded.

    Args:
        name: a folder, a safetensors file, the name of a bundled adapter, or a hub id.

    Raises:
        ValueError: if there is no such folder or file, and it is not reachable on the hub.
    """
    path = Path(resolve_asset(str(name)))
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return path.parent.absolute() if path.name == ADAPTER_WEIGHTS else path.absolute()
    if path.exists():
        raise ValueError(f"adapter {str(name)!r} is neither a folder nor a safetensors file")
    if not HUB_ID.fullmatch(str(name)) or str(name).startswith("."):
        raise ValueError(f"adapter {str(name)!r} does not exist. Expected a folder, a safetensors file or a hub id")
    from huggingface_hub import snapshot_download

    try:  # the files of a whole model in subfolders are not downloaded
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADED, ignore_patterns=["*/*"])).absolute()
    except Exception as error:
        raise ValueError(
            f"adapter {str(name)!r} is neither a folder nor reachable on the hub ({type(error).__name__}). Check the path, or go "
            "online (HF_HUB_OFFLINE unset) to download it"
        ) from error


def lora_file(path: Path) -> Path | None:
    """Return the file with a LoRA's weights in a format that diffusers reads, or None.

    Args:
        path: the file, or a folder with `LORA_FILE` or only one safetensors file.

    Raises:
        ValueError: if several files of a folder may be meant.
    """
    if path.is_file():
        return path
    if (path / LORA_FILE).exists():
        return path / LORA_FILE
    files = sorted(file for file in path.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"adapter {str(path)!r} has {len(files)} safetensors files ({names}). Name the file")
    return files[0] if files else None


def adapter_content(name: str | Path | None) -> str | None:
    """Return a hash of the files of an adapter that decide what it computes. None for no adapter.

    Raises:
        ValueError: as `find_adapter`.
    """
    if name is None:
        return None
    path = find_adapter(name)
    return file_hash(path) if path.is_file() else model_files_hash(path)


def weights_file(path: Path) -> Path:
    """Return the file with an adapter's weights. Raises ValueError if there is none, or several may be meant."""
    file = path / ADAPTER_WEIGHTS if (path / ADAPTER_FILE).exists() else lora_file(path)
    if file is None:
        raise ValueError(f"adapter {str(path)!r} contains no safetensors file")
    return file


def weights_sha256(name: str | Path) -> str:
    """Return the SHA-256 of an adapter's file of weights, 64 hex digits. Raises ValueError as `find_adapter`."""
    with weights_file(find_adapter(name)).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def name_base(base_adapter: str | None, adapter: str | None) -> dict[str, str]:
    """Return the line of a report that names the adapter of its base. Empty if the base is the model alone.

    Args:
        base_adapter: adapter of the base, if one is set.
        adapter: of the tuned model. If it is stacked, the base has the adapter below it.
    """
    below = Path(adapter) / START_FOLDER if adapter else None
    if base_adapter is None and below is not None and below.is_dir():
        base_adapter = str(below)
    return {"base adapter": base_adapter} if base_adapter else {}
