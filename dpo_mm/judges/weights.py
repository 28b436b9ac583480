"""Files of judges: where they are found, a check against their published hash, and loading that runs no code.

A file is found at the location in the judge's name (`@file`, `@folder`), or else under $DPO_MM_WEIGHTS or in the hub's
cache. It is downloaded from the hub only if the name ends in `@hub`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dpo_mm.files.cache_folder import cache_folder
from dpo_mm.judges import JudgeName

T = TypeVar("T")
R = TypeVar("R")
NON_WEIGHT_KEYS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Keys of older CLIP checkpoints that are not weights."""


class Published(NamedTuple):
    """A published file of weights.

    Attributes:
        repo: repository on the hub.
        files: names of the file in the repository, the preferred one first.
        sha256: published hash, or None if none is recorded.
        companions: other files that the weights need.
    """

    repo: str
    files: tuple[str, ...]
    sha256: str | None = None
    companions: tuple[str, ...] = ()


def weights_folder() -> Path:
    """Folder of the judges' files: $DPO_MM_WEIGHTS, or `weights` in $DPO_MM_CACHE (default: ~/.cache/dpo-mm)."""
    return Path(os.environ.get("DPO_MM_WEIGHTS") or cache_folder() / "weights")


def find_weights(published: Published, judge_name: JudgeName) -> Path:
    """Find a published file on this machine, or download it if the judge's name ends in `@hub`.

    Raises:
        ValueError: if the file is missing. The message names the file and the path where it belongs.
    """
    if judge_name.location == "hub":
        return _download(published, judge_name)
    location = Path(judge_name.location).expanduser() if judge_name.location else None
    if location and location.is_file():
        return location
    if location and not location.is_dir():
        raise ValueError(f"judge {judge_name.judge!r}: {judge_name.location}: no such file or folder")
    folders = [location] if location else [weights_folder(), *_cached_snapshots(published)]
    for folder in folders:
        for file in published.files:
            for path in (folder / published.repo / file, folder / file):
                if path.is_file():
                    return path
    folder = location or weights_folder()
    with_model = f"{judge_name.judge}:{judge_name.model}" if judge_name.model else judge_name.judge
    raise ValueError(
        f"judge {judge_name.judge!r} needs {published.files[0]} of huggingface.co/{published.repo}. Save it as "
        f"{folder / published.repo / published.files[0]}, name the judge {with_model}@FILE with the path of the file, "
        f"or name it {with_model}@hub to download the file."
    )


def cached_file(repo: str, file: str, revision: str | None = None) -> Path | None:
    """Path of a file in the hub's cache, or None if it is not cached. Sends no request."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(repo, file, revision=revision)
    except ValueError:  # not a valid name of a repository
        return None
    return Path(path) if isinstance(path, str) else None


def _cached_snapshots(published: Published) -> list[Path]:
    paths = [cached_file(published.repo, file) for file in published.files]
    return [path.parent for path in paths if path]


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """Context manager in which the hub's client reads only its cache, as with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _download(published: Published, judge_name: JudgeName) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in published.files:
        try:
            for companion in published.companions:
                hf_hub_download(published.repo, companion)
            return Path(hf_hub_download(published.repo, file))
        except LocalEntryNotFoundError as error:
            raise ValueError(_unreachable(published, judge_name)) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client raises many types
            raise ValueError(f"{_unreachable(published, judge_name)} ({shorten(error)})") from error
    raise ValueError(
        f"judge {judge_name.judge!r}: huggingface.co/{published.repo} has no {' or '.join(published.files)}"
    )


def _unreachable(published: Published, judge_name: JudgeName) -> str:
    path = weights_folder() / published.repo / published.files[0]
    return (
        f"judge {judge_name.judge!r}: the hub cannot be reached. Download {published.files[0]} of "
        f"huggingface.co/{published.repo} on another machine and save it as {path}."
    )


def shorten(error: Exception, length: int = 200) -> str:
    """Text of an error on one line, at most `length` characters."""
    return " ".join(str(error).split())[:length]


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    The file is safetensors, or a PyTorch file read with weights_only. Its tensors may be under `state_dict`.

    Raises:
        ValueError: if the file is broken, or contains anything but tensors (reading it would run code).
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format and torch version raises other types
        raise ValueError(
            f"{path}: not readable as plain weights ({shorten(error, 160)}). Expected safetensors, or a PyTorch file "
            "that contains only tensors."
        ) from error
    state = state.get("state_dict", state)
    tensors = {str(name).removeprefix("module."): value for name, value in state.items()}
    wrong = next((name for name, value in tensors.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong!r} is not a tensor. Expected a file of weights.")
    return tensors


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load all weights of a checkpoint into a model and return the model.

    Raises:
        ValueError: if a key is missing, unexpected or of another shape. The message names it.
    """
    state = {name: value for name, value in read_state(path).items() if name not in NON_WEIGHT_KEYS}
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    reshaped = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if missing or extra or reshaped:
        difference = (
            f"lacks {missing[0]}"
            if missing
            else f"has the unexpected {extra[0]}"
            if extra
            else f"has another shape of {reshaped[0]}"
        )
        raise ValueError(f"{path}: {difference}. The weights may belong to another model.")
    model.load_state_dict(state)
    return model


def sha256(path: Path) -> str:
    """Hash of a file's content. The file is read again only if its size or modification time changes."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_card(*files: tuple[Path, Published]) -> dict[str, Any]:
    """Describe files: repository, sha256, and if it is the published one (None if no published hash is recorded)."""
    return {
        path.name: {
            "repo": published.repo,
            "sha256": sha256(path),
            "published": sha256(path) == published.sha256 if published.sha256 else None,
        }
        for path, published in files
    }


def device() -> torch.device:
    """Device of the judges: $DPO_MM_DEVICE, or this process's GPU, or the CPU."""
    if os.environ.get("DPO_MM_DEVICE"):
        return torch.device(os.environ["DPO_MM_DEVICE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def in_batches(function: Callable[[Sequence[T]], list[R]], items: Sequence[T], size: int) -> list[R]:
    """Apply a function to all items, `size` per batch. A batch that does not fit on the GPU is halved."""
    results: list[R] = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            results += function(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            results += in_batches(function, batch, (len(batch) + 1) // 2)
    return results
