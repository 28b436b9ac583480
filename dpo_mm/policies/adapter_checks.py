"""Checks of a LoRA's files before a model is changed: settings, regular expressions, ranks, names, and finite weights."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpo_mm.models.model_checks import check_finite_tensors, check_folder, check_safetensors, read_config

ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"
"""Key of the LoRA's settings in the header of diffusers' file."""
UNSUPPORTED_WEIGHTS = {
    ".hada_": "LoHa", ".lokr_": "LoKr", ".oft_": "OFT", ".lora_mid": "LoCon with a Tucker decomposition",
    "dora_scale": "kohya's DoRA (dora_scale)",
}  # fmt: skip
"""Kinds of weights that diffusers leaves out or that cannot be trained further, by a part of their names."""
MAX_RANK = 4096
PLAIN_NAME = re.compile(r"[\w.\-/]+")
"""Names of tensors. diffusers makes regular expressions of them."""
SIMPLE_PATTERN = re.compile(r"[\w.\-^$|()\\\[\]:]*")
"""A regular expression without repetition, after each `\\d+` is removed. It takes no long time."""
SECONDS = 3
MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for compiled in (re.compile(pattern), re.compile(rf"(.*\\.)?({pattern})$"), re.compile(rf"(?:^|.*?\\.){pattern}\\.")):
        for name in names:
            compiled.match(name), compiled.fullmatch(name)
"""
"""Program that applies regular expressions to names of modules in the ways of PEFT."""
Shape = Sequence[int]


def check_peft_adapter(folder: Path, model: nn.Module) -> None:
    """Check an adapter in PEFT's format.

    Args:
        folder: the adapter.
        model: the model without the adapter.

    Raises:
        ValueError: if it has only pickled weights, which can run code when they are loaded, or if its settings or weights are
            damaged or out of range. It names the file.
    """
    from safetensors.torch import load_file

    weights_file, config_file = folder / ADAPTER_WEIGHTS, folder / ADAPTER_FILE
    if not weights_file.exists():
        raise ValueError(f"adapter {str(folder)!r} has no {ADAPTER_WEIGHTS}. Pickled weights are not loaded")
    check_folder(folder)
    settings = read_config(config_file, fix="Save the adapter again")
    if not isinstance(settings.get("peft_type"), str):
        raise ValueError(
            f"{config_file}: peft_type is {settings.get('peft_type')!r:.80}. Expected a text, such as LORA"
        )
    if settings.get("megatron_config"):
        raise ValueError(f"{config_file}: megatron_config names a module to import, which is not supported")
    weights = load_file(weights_file)
    _check_tensors(weights, weights_file)
    _check_settings(settings, [name for name, _ in model.named_modules()], config_file, weights)


def check_diffusers_lora(file: Path, models: Mapping[str, nn.Module]) -> None:
    """Check a LoRA in diffusers' format, or in another that diffusers reads.

    Args:
        file: the file of weights.
        models: the pipeline's models by name.

    Raises:
        ValueError: as `check_peft_adapter`.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if check_safetensors(file) == 0:
        raise ValueError(f"{file}: has no weights. Save the adapter again")
    weights = load_file(file)
    _check_tensors(weights, file)
    for name in weights:
        kind = next((kind for part, kind in UNSUPPORTED_WEIGHTS.items() if part in name), None)
        if kind:
            raise ValueError(f"{file}: has {kind} weights ({name}), which are not supported. Use a LoRA")
        part = name.partition(".")[0]
        if part.startswith("text_encoder") and models.get(part) is None:
            raise ValueError(
                f"{file}: the weight {name} is of a {part}, which the model does not have. Is it of another model?"
            )
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    if not text:
        return
    try:
        metadata = json.loads(text)
        parts = {name.partition(".")[0] for name in metadata}
        by_part = {
            part: {
                name.removeprefix(f"{part}."): value for name, value in metadata.items() if name.startswith(f"{part}.")
            }
            for part in parts
        }
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: {METADATA} in its header is damaged ({error}). Save the adapter again") from None
    for part, settings in by_part.items():
        model = models.get(part)
        names = [name for name, _ in model.named_modules()] if model is not None else []
        _check_settings(settings, names, file, weights)


def _check_tensors(weights: Mapping[str, Tensor], file: Path) -> None:
    strange = next((name for name in weights if not PLAIN_NAME.fullmatch(name)), None)
    if strange is not None:
        raise ValueError(f"{file}: a tensor is called {strange[:80]!r}, which is not the name of a weight")
    rank = max(_ranks(weights), default=0)
    if rank > MAX_RANK:
        raise ValueError(f"{file}: its LoRA has rank {rank:,}, more than {MAX_RANK:,}")
    check_finite_tensors(dict(weights), str(file))


def _ranks(weights: Mapping[str, Tensor]) -> list[int]:
    """Ranks of a LoRA's tensors: the first dimension of each down-projection."""
    downs = (
        tensor for name, tensor in weights.items() if "lora_A" in name or "lora_down" in name or "lora.down" in name
    )
    return [int(tensor.shape[0]) for tensor in downs if tensor.ndim >= 2]


def _check_settings(
    settings: Mapping[str, Any], names: Sequence[str], file: Path, weights: Mapping[str, Tensor]
) -> None:
    """Check a LoRA's settings, as PEFT names them."""
    stored = max(_ranks(weights), default=MAX_RANK)
    fix = "Save the adapter again"
    ranks, alphas = (_mapping(settings, name, file) for name in ("rank_pattern", "alpha_pattern"))
    for name, rank in {**({"r": settings["r"]} if "r" in settings else {}), **ranks}.items():
        if type(rank) is not int or not 1 <= rank <= stored:
            raise ValueError(
                f"{file}: the rank {name!r:.80} is {rank!r:.80}, but its weights have rank {stored}. {fix}"
            )
    scales = {"lora_alpha": settings["lora_alpha"]} if settings.get("lora_alpha") is not None else {}
    for name, alpha in {**scales, **alphas}.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or abs(alpha) > 2**31:
            raise ValueError(f"{file}: the alpha {name!r:.80} is {alpha!r:.80}. Expected a number. {fix}")
    patterns = [*ranks, *alphas]
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = settings.get(name)
        if isinstance(value, str):
            patterns.append(value)
        elif value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f"{file}: {name} is {value!r:.80}. Expected names of modules. {fix}")
        elif value and name in ("layers_pattern", "modules_to_save"):
            patterns += value
    _check_patterns(patterns, names, file)


def _mapping(settings: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {name} is {value!r:.80}. Expected a JSON object. Save the adapter again")
    return value


def _check_patterns(patterns: Iterable[str], names: Sequence[str], file: Path) -> None:
    """Apply regular expressions in another process, which can be ended: some take longer than the age of the universe.

    Raises:
        ValueError: if one is not valid, or takes more than SECONDS.
    """
    try:
        patterns = [re.compile(pattern).pattern for pattern in patterns]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{file}: a regular expression for modules is not valid ({error})") from None
    patterns = [pattern for pattern in patterns if not SIMPLE_PATTERN.fullmatch(pattern.replace(r"\d+", ""))]
    if not patterns:
        return
    command = [sys.executable, "-I", "-S", "-c", MATCH]
    try:
        run = subprocess.run(
            command, input=json.dumps([patterns, names]), text=True, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        problem = f"takes more than {SECONDS} seconds to match"
    else:
        problem = "is not valid" if run.returncode else ""
    if problem:
        raise ValueError(
            f"{file}: a regular expression for modules {problem} ({', '.join(patterns)[:120]!r}). List the names of the modules "
            "instead"
        )
