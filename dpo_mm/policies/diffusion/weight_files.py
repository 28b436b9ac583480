"""Files of trained denoiser weights: a LoRA in the formats of diffusers, kohya and PEFT, or a whole denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_mm.models.model_loading import load_module
from dpo_mm.policies.adapter_sources import START_FOLDER
from dpo_mm.policies.adapters import (
    LORA_FILE,
    SavedLora,
    Weights,
    has_lora,
    read_lora,
    read_peft,
    save_kohya,
    save_lora,
    save_whole,
    saved_lora,
)
from dpo_mm.policies.diffusion.peft_files import peft_usage, save_peft, takes_peft_only
from dpo_mm.policies.diffusion.text_encoder_lora import encoders_of, saved_encoders
from dpo_mm.policies.single_file import load_line
from dpo_mm.policies.start_adapter import save_start, start_file

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def save(policy: DiffusionPolicy, folder: Path, weights: Weights) -> None:
    """Write the LoRA in diffusers' format, and in kohya's if the config says so, or else the whole denoiser.

    A pipeline without LoRA files in diffusers gets a LoRA in PEFT's format.

    Args:
        policy: a prepared policy.
        folder: an existing folder.
        weights: the gathered state, if the model's own is sharded over several processes.
    """
    if not has_lora(policy.model):
        save_whole(policy.model, folder / policy.denoiser, weights)
        return
    if takes_peft_only(policy.pipe):
        save_peft(policy, folder, weights)
        save_start(policy.config, folder)
        return
    encoders = saved_encoders(policy)
    save_lora(policy.pipe, policy.denoiser, folder, weights, encoders)
    if policy.config.lora_format == "kohya":
        save_kohya(kohya_loras(policy, encoders, weights), folder)
    save_start(policy.config, folder)


def kohya_loras(
    policy: DiffusionPolicy, encoders: Mapping[str, SavedLora], weights: Weights = None
) -> dict[str, SavedLora]:
    """Return the LoRAs of a policy by the prefix of their names in kohya's file, with kohya's names of the modules.

    Args:
        policy: a policy with a LoRA, of a family with a `kohya_prefix`.
        encoders: LoRAs of text encoders by name.
        weights: as in `save`.
    """
    assert policy.kohya_prefix is not None
    lora = saved_lora(policy.model, weights)
    if hasattr(policy, "kohya_module"):
        lora = lora.renamed(policy.kohya_module)
    loras = {policy.kohya_prefix: lora}
    for name, lora in encoders.items():
        number = name[-1] if name[-1].isdigit() else "1" if hasattr(policy.pipe, "text_encoder_2") else ""
        part = "" if next(iter(lora.alphas)).startswith("text_model.") else "_text_model"
        loras[f"lora_te{number}{part}"] = lora
    return loras


def load_weights(policy: DiffusionPolicy, folder: Path) -> None:
    """Load what `save` wrote into the prepared model.

    Raises:
        ValueError: if the weights do not fit the model.
    """
    if has_lora(policy.model) and takes_peft_only(policy.pipe):
        read_peft(policy.model, folder)
    elif has_lora(policy.model):
        for name, model in {policy.denoiser: policy.model, **encoders_of(policy)}.items():
            read_lora(model, name, folder / LORA_FILE)
    else:
        stored = load_module(type(policy.model), str(folder / policy.denoiser))
        policy.model.load_state_dict(stored.state_dict())


def usage_snippet(policy: DiffusionPolicy, base: str, folder: str) -> list[str]:
    """Return lines of Python that load the base pipeline and the weights that `save` wrote with diffusers, or PEFT."""
    load = load_line(base, policy.dtype)
    if policy.config.tuning == "lora" and takes_peft_only(policy.pipe):
        return peft_usage(policy, load, folder)
    if policy.config.tuning == "lora":
        if (start := start_file(policy.config)) is None:
            return [load, f'pipe.load_lora_weights("{folder}")']
        return [
            load,
            f'pipe.load_lora_weights("{folder}/{START_FOLDER}", weight_name="{start.name}", adapter_name="start")',
            f'pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}", adapter_name="tuned")',
            'pipe.set_adapters(["start", "tuned"])',
        ]
    denoiser = f"pipe.{policy.denoiser}"
    return [load, f'{denoiser} = type({denoiser}).from_pretrained("{folder}", subfolder="{policy.denoiser}")']
