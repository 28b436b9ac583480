"""Files of a LoRA whose pipeline has no loader in diffusers: PEFT's format, which `PeftModel.from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.policies.adapter_checks import ADAPTER_WEIGHTS
from dpo_mm.policies.adapter_sources import START_FOLDER
from dpo_mm.policies.adapters import PEFT_PREFIX, Weights, saved_lora
from dpo_mm.policies.start_adapter import start_file

if TYPE_CHECKING:
    from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy


def takes_peft_only(pipe: Any) -> bool:
    """Return True if diffusers has no LoRA files for a pipeline."""
    return not hasattr(pipe, "load_lora_weights")


def save_peft(policy: DiffusionPolicy, folder: Path, weights: Weights) -> None:
    """Write the LoRA of a prepared policy in PEFT's format. `weights` is as in `weight_files.save`."""
    from safetensors.torch import save_file

    adapter = saved_lora(policy.model, weights)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.config.save_pretrained(str(folder))
    save_file({PEFT_PREFIX + name: value for name, value in adapter.weights.items()}, folder / ADAPTER_WEIGHTS)


def peft_usage(policy: DiffusionPolicy, load: str, folder: str) -> list[str]:
    """Return lines of Python that load a pipeline with the line `load`, and what `save_peft` wrote with PEFT."""
    target = f"pipe.{policy.denoiser}"
    start = f'{target} = PeftModel.from_pretrained({target}, "{folder}/{START_FOLDER}").merge_and_unload()'
    below = [start] if start_file(policy.config) else []
    return [load, *below, f'{target} = PeftModel.from_pretrained({target}, "{folder}")']
