"""Files of judges: where they are looked for, that they are what was published, and that reading them runs no code.

A file is looked for where the judge's name says (`@file`, `@folder`), else under $DPO_MM_WEIGHTS and in the hub's cache.
It is fetched from the hub only where the name says `@hub`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dpo_mm.judges import JudgeName

T = TypeVar("T")
R = TypeVar("R")
NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""Keys of older CLIP checkpoints that are no weights."""


class Published(NamedTuple):
    """A file as it was published: repository on the hub, its name there (others after it), its sha256, what goes with it."""

    repo: str
    files: tuple[str, ...]
    sha256: str | None = None
    beside: tuple[str, ...] = ()


def weights_folder() -> Path:
    """Where judges' files are looked for: $DPO_MM_WEIGHTS, or weights in $DPO_MM_CACHE, by default ~/.cache/dpo-mm."""
    cache = (
        os.environ.get("DPO_MM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-mm"
    )
    return Path(os.environ.get("DPO_MM_WEIGHTS") or Path(cache) / "weights")


def find(published: Published, named: JudgeName) -> Path:
    """The file on this machine. Raises ValueError that says which file to get and where to put it."""
    if named.where == "hub":
        return _fetch(published, named)
    given = Path(named.where).expanduser() if named.where else None
    if given and given.is_file():
        return given
    if given and not given.is_dir():
        raise ValueError(f"judge {named.judge!r}: {named.where}: no such file or folder")
    folders = [given] if given else [weights_folder(), *_cached(published)]
    for folder in folders:
        for file in published.files:
            for place in (folder / published.repo / file, folder / file):
                if place.is_file():
                    return place
    folder = given or weights_folder()
    with_model = f"{named.judge}:{named.model}" if named.model else named.judge
    raise ValueError(
        f"judge {named.judge!r} needs {published.files[0]} of huggingface.co/{published.repo}: put it at "
        f"{folder / published.repo / published.files[0]}, or name the judge {with_model}@FILE with the file's path, "
        f"or {with_model}@hub to have it fetched"
    )


def _cached(published: Published) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(published.repo, file) for file in published.files]
    return [Path(path).parent for path in found if isinstance(path, str)]


def _fetch(published: Published, named: JudgeName) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in published.files:
        try:
            for other in published.beside:
                hf_hub_download(published.repo, other)
            return Path(hf_hub_download(published.repo, file))
        except LocalEntryNotFoundError as error:
            raise ValueError(_unreachable(published, named)) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client has many kinds
            raise ValueError(f"{_unreachable(published, named)} ({' '.join(str(error).split())[:200]})") from error
    raise ValueError(f"judge {named.judge!r}: huggingface.co/{published.repo} has no {' or '.join(published.files)}")


def _unreachable(published: Published, named: JudgeName) -> str:
    place = weights_folder() / published.repo / published.files[0]
    return (
        f"judge {named.judge!r}: the hub can't be reached; get {published.files[0]} of huggingface.co/{published.repo} "
        f"on another machine and put it at {place}"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or what torch reads with weights_only, under `state_dict` or bare.

    Raises ValueError where it is broken or holds anything but tensors, which reading would have to run.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format and torch version has its own kinds
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path}: not readable as plain weights ({reason}); expected safetensors, or a PyTorch file of tensors alone"
        ) from error
    state = state.get("state_dict", state)
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    strange = next((name for name, value in named.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise ValueError(f"{path}: {strange!r} is no tensor; expected a file of weights")
    return named


def fill(model: nn.Module, path: Path) -> nn.Module:
    """The model with a checkpoint's weights, all of them. Raises ValueError that names a key that doesn't fit."""
    state = {name: value for name, value in read_state(path).items() if name not in NO_WEIGHTS}
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or extra or shapes:
        wrong = (
            f"lacks {missing[0]}" if missing else f"has {extra[0]}" if extra else f"has another shape of {shapes[0]}"
        )
        raise ValueError(f"{path}: {wrong}; are these weights of another model?")
    model.load_state_dict(state)
    return model


def sha256(path: Path) -> str:
    """The file's sha256, read once for as long as the file stays the same."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_card(*files: tuple[Path, Published]) -> dict[str, Any]:
    """Files with their sha256, and whether that is the one published; None where none is recorded."""
    return {
        path.name: {
            "repo": published.repo,
            "sha256": sha256(path),
            "published": sha256(path) == published.sha256 if published.sha256 else None,
        }
        for path, published in files
    }


def device() -> torch.device:
    """Where judges run: $DPO_MM_DEVICE, or this process's GPU, or the CPU."""
    if os.environ.get("DPO_MM_DEVICE"):
        return torch.device(os.environ["DPO_MM_DEVICE"])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def in_batches(function: Callable[[Sequence[T]], list[R]], items: Sequence[T], size: int) -> list[R]:
    """What a function gives of all items, `size` at a time; a batch that the GPU can't hold is halved."""
    found: list[R] = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            found += function(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            found += in_batches(function, batch, (len(batch) + 1) // 2)
    return found
