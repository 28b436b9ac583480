"""Write a finished run in the format of another program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from dpo_mm.assets import resolve_asset
from dpo_mm.errors import did_you_mean
from dpo_mm.export.finished_run import FinishedRun
from dpo_mm.export.vllm_limits import why_not_served
from dpo_mm.policies.adapter_checks import ADAPTER_FILE, ADAPTER_WEIGHTS
from dpo_mm.policies.adapters import LORA_FILE, has_lora, lora_models, merge_pipeline, save_kohya, saved_lora
from dpo_mm.policies.diffusion.diffusion_policy import DiffusionPolicy
from dpo_mm.policies.families import load_policy, policy_class
from dpo_mm.policies.lora_layers import merge_peft
from dpo_mm.policies.protocol import ImagePolicy, TextPolicy
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage


def check_format(run: FinishedRun, to: str) -> None:
    """Check that a run can be written in a format, before a model is loaded.

    Args:
        run: a finished run.
        to: a key of FORMATS.

    Raises:
        ValueError: if the format is unknown, or the run does not go with it.
    """
    if to not in FORMATS:
        raise ValueError(f"to {to!r} is unknown; {did_you_mean(to, FORMATS)}")
    family = policy_class(run.model, revision=run.settings.get("revision"))
    if to == "merged":
        return
    if (family.modality == "text") != (to == "vllm"):
        if to == "vllm":
            raise ValueError(
                f"to 'vllm': {run.name!r} generates images, which vLLM does not. Use diffusers, kohya or merged"
            )
        raise ValueError(
            f"to {to!r}: {run.name!r} is of a text model, and this format is for images. Use vllm or merged"
        )
    if not run.has_lora:
        raise ValueError(f"to {to!r}: {run.name!r} is a fully tuned model without an adapter. Use merged")
    if run.is_stacked:
        raise ValueError(f"to {to!r}: {run.name!r} is stacked on another adapter, and one file has one. Use merged")
    if to == "diffusers" and not (run.folder / LORA_FILE).is_file():
        raise ValueError(f"to 'diffusers': pipelines of {family.__name__} load no LoRA file. Use merged")
    if to == "kohya" and getattr(family, "kohya_prefix", None) is None:
        raise ValueError(f"to 'kohya': {family.__name__} has no names in kohya's format. Use diffusers or merged")
    if to == "vllm" and (reason := why_not_served(run.folder)):
        raise ValueError(f"to 'vllm': {run.name!r} {reason}. Use merged")


def export_diffusers(run: FinishedRun, folder: Path) -> dict[str, str]:
    """Copy the LoRA's file, which stock diffusers loads. Returns nothing to report."""
    shutil.copyfile(run.folder / LORA_FILE, folder / LORA_FILE)
    return {}


def export_kohya(run: FinishedRun, folder: Path) -> dict[str, str]:
    """Write the LoRA under the names that kohya's scripts, ComfyUI and A1111 read.

    Raises:
        ValueError: if it has parts that the format cannot contain.
    """
    from dpo_mm.policies.diffusion.weight_files import kohya_loras

    policy = load_run(run, precision="fp32")
    assert isinstance(policy, DiffusionPolicy)
    parts = {name: part for name, part in policy.pipe.components.items() if has_lora(part)}
    encoders = {name: saved_lora(part) for name, part in parts.items() if part is not policy.model}
    loras = kohya_loras(policy, encoders)
    for lora in loras.values():
        if lora.config.use_dora or lora.config.lora_bias:
            raise ValueError(
                f"to 'kohya': {run.name!r} has {'DoRA' if lora.config.use_dora else 'biases'}. Use diffusers or merged"
            )
    save_kohya(loras, folder)
    return {}


def export_vllm(run: FinishedRun, folder: Path) -> dict[str, str]:
    """Copy the adapter in PEFT's format. Returns its rank and targets, which vLLM is started with."""
    for name in (ADAPTER_FILE, ADAPTER_WEIGHTS):
        shutil.copyfile(run.folder / name, folder / name)
    settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    targets = settings["target_modules"]
    return {"rank": str(settings["r"]), "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets))}


def export_merged(run: FinishedRun, folder: Path) -> dict[str, str]:
    """Save base and adapter as one pipeline or one model with its processor, or a fully tuned model as a whole.

    The sum is computed in float32 and saved in the precision of the training.
    """
    precision = run.settings.get("precision")
    policy = load_run(run, precision=precision if precision in ("bf16", "fp16") else "fp32")
    if policy.modality == "image":
        if lora_models(policy.pipe):
            merge_pipeline(policy.pipe)
        policy.pipe.save_pretrained(folder)
    else:
        assert isinstance(policy, VisionLanguage)
        model = merge_peft(policy.model) if has_lora(policy.model) else policy.model
        model.save_pretrained(folder)
        policy.processor.save_pretrained(folder)
    return {"precision": precision if precision in ("bf16", "fp16") else "fp32"}


def load_run(run: FinishedRun, *, precision: str) -> ImagePolicy | TextPolicy:
    """Load the base of a run with its result attached, on the CPU."""
    return load_policy(
        resolve_asset(run.model),
        revision=run.settings.get("revision"),
        precision=precision,
        device="cpu",
        adapter=run.folder,
    )


FORMATS: dict[str, Callable[[FinishedRun, Path], dict[str, str]]] = {
    "diffusers": export_diffusers,
    "kohya": export_kohya,
    "merged": export_merged,
    "vllm": export_vllm,
}
"""Function that writes each format into a folder."""
