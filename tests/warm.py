"""Imported by the process from which tests fork commands, see forked.py: all of the package, and what it imports late."""

from __future__ import annotations

import contextlib
import gc
import importlib
import pkgutil

import dpo_mm

for found in pkgutil.walk_packages(dpo_mm.__path__, "dpo_mm."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
for name in ("open_clip", "torchvision.transforms", "matplotlib.figure", "jinja2", "gradio", "tests.conftest"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
for name in (
    "diffusers:StableDiffusionPipeline",
    "diffusers:DPMSolverMultistepScheduler",
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
):  # what these libraries import when it is first asked for
    module, _, member = name.partition(":")
    getattr(importlib.import_module(module), member)
gc.freeze()  # a child that collects rubbish need not go through, and copy, all of this
