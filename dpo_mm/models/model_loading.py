"""Open models and pipelines, and refuse one whose files do not have all of its weights, or are damaged.

diffusers and transformers fill missing tensors with random numbers and go on. A base with random weights trains, and the
comparison looks plausible, so every model is opened by the two functions here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_mm.errors import one_line
from dpo_mm.models.model_checks import SAVE_AGAIN, check_folder, name_model, stored_bytes
from dpo_mm.models.quantization import empty_model, is_large, quantization_config, quiet, refuse_quantized

HARMLESS = ("position_ids", "inv_freq", "num_batches_tracked", "embed_positions.weights")
"""Ends of tensor names that older releases saved and newer ones compute."""
SHOWN = 3
DENOISERS = ("unet", "transformer")
"""Names of the component of a pipeline that denoises."""
SMALL_MODEL, WEIGHTS_PER_BYTE = 10**8, 16
"""A config may describe this number of weights, plus WEIGHTS_PER_BYTE times the bytes of the files (4 bits have 2)."""

_DESCRIBED: dict[tuple[Any, bytes], int] = {}
"""Number of weights that a class and its config describe."""


def load_module(
    cls: Any,
    source: str,
    *,
    label: str = "",
    quantize: str | None = None,
    skip: list[str] | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Any:
    """Load a diffusers or transformers model from safetensors and check its loading report.

    Args:
        cls: the model's class, or an auto class.
        source: folder or hub id.
        label: the part of a pipeline that it is, for the error.
        quantize: nf4, int8 or fp8 for its linear layers, or None. See `dpo_mm.models.quantization`.
        skip: names of modules that are not quantised. None: the head of a language model.
        device: where a quantised model is loaded. None is the GPU if there is one.
        **options: further arguments of `from_pretrained`, such as subfolder, revision and dtype.

    Raises:
        ValueError: if tensors are missing, unexpected or of another shape, which it names, or if the files of a model that is to be
            quantised are quantised already.
    """
    name = f"model {source!r}{label and f', {label}'}"
    folder = Path(source) / options.get("subfolder", "")
    with name_model(name):
        if folder.is_dir():
            check_folder(folder)
        if not cls.__module__.startswith("diffusers."):  # diffusers raises for other shapes, and says which
            options |= {"ignore_mismatched_sizes": True, "trust_remote_code": False}
            _check_size(cls, source, folder, name, options)
        if quantize:
            options |= _quantized(quantize, cls, source, name, skip, device, options)
        try:
            with quiet() if quantize else contextlib.nullcontext():
                module, report = cls.from_pretrained(source, output_loading_info=True, use_safetensors=True, **options)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())[:200]}") from error
    check_report(report, name)
    return module


def _quantized(
    quantize: str,
    cls: Any,
    source: str,
    name: str,
    skip: list[str] | None,
    device: torch.device | str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a model while it loads, on the GPU if there is one."""
    where = {key: options[key] for key in ("subfolder", "revision") if key in options}
    is_diffusers = cls.__module__.startswith("diffusers.")
    refuse_quantized(cls.load_config(source, **where) if is_diffusers else empty_model(cls, source, where)[0], name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = {"device_map": {"": device}} if device.type == "cuda" else {}
    library = "diffusers" if is_diffusers else "transformers"
    return {
        **place,
        "quantization_config": quantization_config(quantize, library=library, dtype=options["dtype"], skip=skip),
    }


def load_part(cls: Any, source: str | Path, *, name: str, **options: Any) -> Any:
    """Load a config, processor, tokenizer or scheduler without running code of the model.

    Args:
        cls: its class, or an auto class.
        source: folder or hub id.
        name: the part and its model, for the error.
        **options: further arguments of `from_pretrained`.

    Raises:
        ValueError: if it is damaged, or needs a package that is not installed. It names the part and the package.
    """
    with name_model(name):
        try:
            if not cls.__module__.startswith("diffusers."):
                options["trust_remote_code"] = False
            return cls.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be loaded: {one_line(error)}") from error


def _check_size(cls: Any, source: str, folder: Path, name: str, options: Mapping[str, Any]) -> None:
    """Refuse a config that describes a model much larger than the files of its weights.

    transformers would make the missing tensors up, in the size of the config.
    """
    stored, config = stored_bytes(folder), folder / "config.json"
    if stored is None:
        return
    key = cls, config.read_bytes() if config.is_file() else b""
    if key not in _DESCRIBED:  # a recipe loads one model several times
        _DESCRIBED[key] = sum(parameter.numel() for parameter in empty_model(cls, source, options)[1].parameters())
    described = _DESCRIBED[key]
    if described > SMALL_MODEL + WEIGHTS_PER_BYTE * stored:
        raise ValueError(
            f"{name}: its config describes {described:,} weights, but its files have {stored:,} bytes. Download or save the "
            "model again"
        )


def check_report(report: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a loading report lists tensors that are missing, unexpected or of another shape.

    Args:
        report: missing_keys, unexpected_keys and mismatched_keys, as both libraries return them.
        name: the model, for the error.
    """
    missing = _names(report.get("missing_keys", ()))
    mismatched = _names(report.get("mismatched_keys", ()))
    unexpected = _names(report.get("unexpected_keys", ()))
    problems = [
        f"{len(tensors)} {problem} ({', '.join(tensors[:SHOWN])}{', ...' * (len(tensors) > SHOWN)})"
        for problem, tensors in (
            ("missing", missing),
            ("of another shape than its config says", mismatched),
            ("that its class does not have", unexpected),
        )
        if tensors
    ]
    if problems:
        raise ValueError(f"{name}: tensors {'; '.join(problems)}. {SAVE_AGAIN}")


def _names(tensors: Iterable[Any]) -> list[str]:
    names = {tensor if isinstance(tensor, str) else tensor[0] for tensor in tensors}
    return sorted(name for name in names if not name.endswith(HARMLESS))


def load_pipeline(
    cls: Any,
    source: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    quantize: str | None = None,
    device: torch.device | str | None = None,
    **parts: Any,
) -> Any:
    """Load a diffusers pipeline, each of its models by `load_module`.

    Args:
        cls: the pipeline's class, or `DiffusionPipeline`.
        source: folder or hub id.
        revision: of a hub model.
        dtype: of all weights that are not quantised.
        quantize: nf4, int8 or fp8 for the denoiser and large text encoders, or None.
        device: where quantised models are loaded.
        **parts: parts that are not to be loaded, such as safety_checker=None, and further arguments.

    Raises:
        ValueError: as `load_module`.
    """
    if Path(source).is_dir():
        check_folder(Path(source))
    index = cls.load_config(source, revision=revision)
    variant: dict[str, Any] = {}
    check_libraries(index, source)
    for name, entry in index.items():
        if name in parts or not isinstance(entry, list | tuple) or entry[0] not in ("diffusers", "transformers"):
            continue
        part = getattr(importlib.import_module(entry[0]), entry[1], None)
        if isinstance(part, type) and issubclass(part, nn.Module):
            options = {"label": name, "subfolder": name, "revision": revision, "dtype": dtype}
            if quantize and (name in DENOISERS or (entry[0] == "transformers" and is_large(part, source, options))):
                options |= {"quantize": quantize, "device": device}
            try:
                parts[name] = load_module(part, source, **options)
            except OSError:  # no file without a variant, as in many models for SDXL
                variant = {"variant": "fp16"}
                parts[name] = load_module(part, source, **options, **variant)
    options = {"revision": revision, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    return cls.from_pretrained(source, **options, **variant, **parts)


def check_libraries(index: Mapping[str, Any], source: str) -> None:
    """Check that the parts of a pipeline come from diffusers or transformers, because others would be imported.

    Args:
        index: content of the pipeline's model_index.json.
        source: the pipeline, for the error.

    Raises:
        ValueError: if a part comes from elsewhere, or its entry is not a library and a class.
    """
    from diffusers import pipelines

    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list | tuple) or is_number_list(entry):
            continue
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise ValueError(f"model {source!r}: {name} is {entry!r:.80}. Expected a library and a class")
        library = entry[0]
        if library not in (None, "diffusers", "transformers") and not hasattr(pipelines, str(library)):
            raise ValueError(
                f"model {source!r}: {name} comes from {library!r}. Expected diffusers or transformers, because code of models is "
                "not run"
            )


def is_number_list(entry: Any) -> bool:
    """Return True if an entry of a pipeline's index is a setting of several numbers (layers, sigmas), and no part."""
    return isinstance(entry, list | tuple) and bool(entry) and all(isinstance(number, int | float) for number in entry)
