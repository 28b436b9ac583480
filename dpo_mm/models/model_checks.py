"""Checks of a model's or an adapter's folder, before anything is built from it: configs, code, and the files of weights.

A folder may come from somebody else. Its configs must be JSON objects with moderate numbers, it must name no custom code,
and its weights must be complete safetensors files in the folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.errors import TrainingInterrupted, one_line
from dpo_mm.models.quantization import plain_tensors

CONFIGS = ("config.json", "model_index.json", "scheduler_config.json", "adapter_config.json", "generation_config.json",
           "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")  # fmt: skip
"""Names of the configs that decide which classes are built, and with which sizes."""
COUNTS = re.compile(r"layers?($|_per_|s$)|blocks?$|depths?$|stages?$|experts?$|heads?$", re.IGNORECASE)
"""Names of numbers that say how often a part is built."""
MIN_COUNT_LIMIT, MAX_COUNT_LIMIT = 256, 8192
"""A count is at most the number of tensors in the folder. That limit itself is between these two."""
MAX_INTEGER = 2**31
"""Largest integer of a config, apart from UNLIMITED. Real sizes are far below."""
UNLIMITED = re.compile(r"max_length|theta|token_id|seed|longest_edge|max_pixels", re.IGNORECASE)
MOST_TIMESTEPS = 100_000
SAVE_AGAIN = "Download or save the model again"
HEADER_BYTES = 8
MAX_HEADER = 2**27


def read_config(file: Path, *, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: file of a model or an adapter.
        fix: what to do if it is damaged, a sentence without its full stop.

    Raises:
        ValueError: if the content is not a JSON object. It names the file and the fix.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}). {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged (not a JSON object). {fix}")
    return value


def check_folder(folder: Path) -> None:
    """Check the configs and the files of weights of a folder and of its direct subfolders. Checkpoints are not checked.

    Raises:
        ValueError: if a config is not a JSON object, has a number out of range or names code, or a file of weights is
            damaged. It names the file.
    """
    inside = [
        part for part in sorted(folder.iterdir()) if part.is_dir() and not part.name.startswith((".", "checkpoint-"))
    ]
    for part in (folder, *inside):
        tensors = sum(check_safetensors(file) for file in sorted(part.glob("*.safetensors")))
        for name in CONFIGS:
            file = part / name
            if not file.exists():
                continue
            if not file.is_file():
                raise ValueError(f"{file}: not a regular file. Expected a JSON object")
            config = read_config(file, fix=SAVE_AGAIN)
            _refuse_code(config, file)
            _check_numbers(config, file, most=max(MIN_COUNT_LIMIT, min(tensors, MAX_COUNT_LIMIT)))
        for index in part.glob("*.safetensors.index.json"):
            _check_index(index)


def _refuse_code(config: dict[str, Any], file: Path) -> None:
    """Raise ValueError if a config names code that is in the folder or elsewhere."""
    reasons = [name for name in ("auto_map", "custom_pipeline", "custom_pipelines") if config.get(name)]
    if reasons or isinstance(config.get("_class_name"), list):
        name = reasons[0] if reasons else "_class_name"
        raise ValueError(
            f"{file}: the model cannot be loaded, because {name} names custom code ({config[name]!r:.120}), which is not run. "
            "Use a model that transformers or diffusers supports. If this is one, remove the entry"
        )
    if file.name != "model_index.json":
        return
    for name, entry in config.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if isinstance(library, str) and (file.parent / name / f"{library}.py").exists():
            raise ValueError(f"{file}: {name} is custom code ({name}/{library}.py), and code of models is not run")


def _check_numbers(value: Any, file: Path, *, most: int, name: str = "") -> None:
    """Raise ValueError if a number of a config is NaN or larger than its limit."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, file, most=most, name=str(key))
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, file, most=most, name=name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{file}: {name} is NaN. {SAVE_AGAIN}")
        limit = MAX_INTEGER
        if name == "num_train_timesteps":
            limit = MOST_TIMESTEPS
        elif COUNTS.search(name):
            limit = most
        if value > limit and not UNLIMITED.search(name) and (isinstance(value, int) or limit < MAX_INTEGER):
            raise ValueError(
                f"{file}: {name} is {value:.3g}, more than {limit:,}. The file is damaged or not meant to be loaded. Download "
                "or save the model again"
            )


def _check_index(index: Path) -> None:
    """Raise ValueError if an index of sharded weights names a file outside its folder."""
    names = read_config(index, fix=SAVE_AGAIN).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index}: has no weight_map. {SAVE_AGAIN}")
    for name in set(map(str, names.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(
                f"{index}: names the file {name[:80]!r}, which is not in its folder. Download the model again"
            )


def check_safetensors(file: Path) -> int:
    """Check that a file is complete safetensors, by its header and its size, and return its number of tensors.

    Raises:
        ValueError: if it is truncated, or of another format (such as a renamed pickle). It names the file.
    """
    fix = "Pickled or truncated weights are not loaded. Download or save the file again"
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file. {fix}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_BYTES), "little")
        if size < HEADER_BYTES or length > min(size - HEADER_BYTES, MAX_HEADER):
            raise ValueError(f"{file}: not a complete safetensors file ({size:,} bytes). {fix}")
        try:
            header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            ends = [entry["data_offsets"][1] for entry in tensors]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not a safetensors file ({one_line(error)}). {fix}") from None
    expected = HEADER_BYTES + length + max(ends, default=0)
    if expected != size:
        raise ValueError(f"{file}: has {size:,} bytes, but its header says {expected:,}. {fix}")
    return len(tensors)


def stored_bytes(folder: Path) -> int | None:
    """Return the size of a folder's safetensors files, or None if it has none."""
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) if sizes else None


def check_finite(modules: dict[str, nn.Module], name: str) -> None:
    """Check that all weights are finite numbers.

    Args:
        modules: modules by their names in the error.
        name: the model, for the error.

    Raises:
        ValueError: if a weight is NaN or infinite. It names the tensor.
    """
    for part, module in modules.items():
        tensors = {
            f"{key}{(n and f' ({n})') or ''}": inner
            for key, tensor in module.named_parameters()
            for n, inner in enumerate(plain_tensors(tensor.detach()))
            if inner.is_floating_point()
        }
        check_finite_tensors(tensors, f"{name}{part and f', {part}'}")


def check_finite_tensors(tensors: dict[str, Tensor], name: str) -> None:
    """Check that tensors, by name, have no NaN and no infinite value. Raises ValueError that names the tensor."""
    values = [tensor for tensor in tensors.values() if not tensor.is_meta]
    if not values:
        return
    # a sum per tensor reads the weights once and copies nothing. Only a sum that is not finite is looked at again
    sums = torch.stack(
        [
            tensor.sum(dtype=torch.float32).cpu() if tensor.is_cpu else tensor.sum(dtype=torch.float32)
            for tensor in values
        ]
    )
    if sums.isfinite().all():
        return
    for key, tensor in tensors.items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}: the tensor {key} has values that are not finite. Download or save it again")


@contextlib.contextmanager
def name_model(name: str) -> Iterator[None]:
    """Context manager in which what libraries raise for a damaged model becomes a ValueError or OSError that names it.

    Args:
        name: the model or adapter as the error names it, for example "model 'shapes-sd'".
    """
    try:
        yield
    except (TrainingInterrupted, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ValueError(f"{name}: needs a package that is not installed. {one_line(error)}") from error
    except Exception as error:
        if isinstance(error, ValueError | OSError) and _is_ours(error):
            raise
        text = f"{name}: cannot be loaded ({type(error).__name__}: {one_line(error)}). Download or save it again"
        if isinstance(error, OSError):  # a missing file, for which a caller may have another
            raise OSError(text) from error
        raise ValueError(text) from error


def _is_ours(error: BaseException) -> bool:
    """Return True if an error was raised by this package, so that its text is clear."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("dpo_mm.")
