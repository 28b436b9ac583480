"""Import the whole package and its late imports, in the process that tests fork commands from (see forked.py)."""

from __future__ import annotations

import contextlib
import gc
import importlib
import pkgutil

import dpo_mm
from dpo_mm.evaluation.report import page_template

gc.disable()  # imports leave nothing to collect, and each collection would visit all modules
for package_module in pkgutil.walk_packages(dpo_mm.__path__, "dpo_mm."):
    if not package_module.name.endswith("__main__"):
        importlib.import_module(package_module.name)
for name in (
    "open_clip",
    "torchvision.transforms",
    "matplotlib.figure",
    "jinja2",
    "gradio",
    "imagehash",
    "diffusers.guiders",
    "rich._emoji_codes",
    "scipy.fftpack",
    "tests.conftest",
    "tests.reliability.commands",
    "tests.contracts.tiny_readers",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
for name in (
    "diffusers:StableDiffusionPipeline",
    "diffusers:DPMSolverMultistepScheduler",
    "diffusers:DDPMScheduler",
    "diffusers:EDMEulerScheduler",
    "diffusers:DPMSolverSinglestepScheduler",
    "diffusers:DEISMultistepScheduler",
    "diffusers:UniPCMultistepScheduler",
    "diffusers:KDPM2DiscreteScheduler",
    "diffusers:KDPM2AncestralDiscreteScheduler",
    "diffusers:FlowMatchEulerDiscreteScheduler",
    "diffusers.loaders:StableDiffusionLoraLoaderMixin",
    "transformers:AutoModelForImageTextToText",
    "transformers:AutoModelForCausalLM",
    "transformers:AutoProcessor",
    "transformers:LlavaForConditionalGeneration",
    "transformers:LlavaProcessor",
    "transformers:LlamaForCausalLM",
    "transformers:CLIPTextModel",
    "transformers:CLIPVisionModel",
    "transformers:CLIPImageProcessor",
    "transformers:TextIteratorStreamer",
    "transformers:Trainer",
):  # these libraries import their members at first access
    module, _, member = name.partition(":")
    getattr(importlib.import_module(module), member)
page_template()
with contextlib.suppress(ImportError):  # a table that transformers builds when it loads its first model
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("clip")
gc.enable()
gc.freeze()  # otherwise garbage collection in a forked process would visit, and so copy, all of this
