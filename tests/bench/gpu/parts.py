"""The parts: what each answers, its function, its settings on a GPU, and what a CPU changes in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.bench.gpu import (
    attention,
    bundled,
    compiling,
    generating,
    half,
    image_steps,
    memory,
    optimizers,
    references,
    resuming,
    runs,
    vlm_steps,
)
from tests.bench.gpu.cells import Cells


class Part(NamedTuple):
    """A part of the measurements.

    Attributes:
        question: what it answers.
        measure: function that measures its cells.
        settings: values by name.
        tiny: those of `settings` that are different with --tiny.
    """

    question: str
    measure: Callable[[Cells], None]
    settings: dict[str, Any]
    tiny: dict[str, Any]


STEP = {"precision": "bf16", "rounds": 7}
TINY_STEP = {"precision": "fp32", "rounds": 1}
IMAGES = "Is a step as much faster than the published loop as the FLOPs allow, and where is the rest?"
RESPONSES = "Is a step as much faster than TRL's as the FLOPs allow, and does the shared prefix pay?"
TINY_RESPONSES = {**TINY_STEP, "image_tokens": 16, "response_tokens": 8, "pairs": 2}


def _responses(size: str, image_tokens: int, tiny_variants: list[str]) -> Part:
    variants = ["plain", "prefix", "reference kept", "trl"]
    row = {"image_tokens": image_tokens, "response_tokens": 128, "pairs": 2}
    settings = {
        "size": size,
        "checkpointing": True,
        "variants": variants,
        **row,
        **STEP,
        "rounds": 5 if size == "3B" else 3,
    }
    return Part(RESPONSES, vlm_steps.against_trl, settings, {**TINY_RESPONSES, "variants": tiny_variants})


def _bundled(task: str, tiny: dict[str, str]) -> Part:
    question = "How long does the quickstart take, and are its rates those of a CPU?"
    settings: dict[str, Any] = {"task": task, "overrides": {}, "rows": None}
    return Part(question, bundled.quickstart, settings, {"overrides": tiny, "rows": 4})


PARTS = {
    "bundled_images": _bundled(
        "faithfulness",
        {"train.steps": "2", "train.batch_size": "2", "compare.max_prompts": "2",
         "compare.images_per_prompt": "1", "compare.num_inference_steps": "1", "train.warmup_steps": "0"},
    ),
    "bundled_ocr": _bundled("ocr", {"mine.max_questions": "2", "mine.max_new_tokens": "8", "mine.judges": "cer", "train.steps": "2",
                                    "train.batch_size": "2", "compare.max_questions": "4", "compare.max_new_tokens": "8"}),
    "bundled_captioner": _bundled(
        "captioner", {"mine.max_questions": "2", "mine.judges": "cer", "mine.max_new_tokens": "8", "train.steps": "2", "train.batch_size": "2",
                      "compare.max_questions": "4", "compare.max_new_tokens": "8"}),
    "steps_sd15": Part(IMAGES, image_steps.against_published,
                       {"model": "sd15", "pairs": 4, "checkpointing": False, **STEP}, {"pairs": 5, **TINY_STEP}),
    "steps_sdxl": Part(IMAGES, image_steps.against_published,
                       {"model": "sdxl", "pairs": 4, "checkpointing": True, **STEP}, {"pairs": 1, **TINY_STEP}),
    "steps_flux": Part("Does FLUX.1-dev train with the attention that torch chooses, and how fast?",
                       image_steps.without_published,
                       {"model": "FLUX.1-dev", "pairs": 1, "checkpointing": True, **STEP, "rounds": 5}, TINY_STEP),
    "runs_sd15": Part("How long is a step of a whole run, with loading and optimizer, by precision and workers?",
                      runs.through_train,
                      {"model": "sd15", "pairs": 8, "rows": 32, "precision": "bf16", "steps": [6, 26],
                       "runs": {"bf16": {"precision": "bf16"}, "bf16, 4 workers": {"precision": "bf16", "workers": 4},
                                "bf16, precomputed": {"precision": "bf16", "reference": "precomputed", "fixed_draws_per_row": 4},
                                "fp16": {"precision": "fp16"}, "fp32": {"precision": "fp32"}}},
                      {"pairs": 1, "rows": 2, "precision": "fp32", "steps": [1, 2], "runs": {"fp32": {"precision": "fp32"}}}),
    "vlm_3b_576": _responses("3B", 576, ["plain"]),
    "vlm_3b_1024": _responses("3B", 1024, ["prefix"]),
    "vlm_7b_576": _responses("7B", 576, ["reference kept"]),
    "vlm_7b_1024": _responses("7B", 1024, ["trl"]),
    "attention": Part("Which attention kernel computes the shared prefix exactly, and how large is rounding?",
                      attention.leak_by_backend,
                      {"size": "3B", "image_tokens": 576, "response_tokens": 128, "pairs": 2,
                       "precisions": ["fp32", "bf16", "fp16"], "backends": list(attention.BACKENDS)},
                      {**TINY_RESPONSES, "precisions": ["fp32", "bf16"], "backends": ["math", "default"]}),
    "half_images": Part("Is a margin in half precision that of float32?", half.images,
                        {"models": ["SD1.5", "SDXL", "SD3.5 Medium"], "batch": 4, "pairs": 32,
                         "precisions": ["bf16", "fp16"]},
                        {"models": ["SD1.5"], "batch": 2, "pairs": 4, "precisions": ["bf16"]}),
    "half_flux": Part("Is a margin in half precision that of float32?", half.images,
                      {"models": ["FLUX.1-dev"], "batch": 1, "pairs": 8, "precisions": ["bf16", "fp16"]},
                      {"pairs": 2, "precisions": ["fp16"]}),
    "half_responses": Part("Is a margin in half precision that of float32?", half.responses,
                           {"sizes": ["3B"], "image_tokens": 576, "response_tokens": 64, "batch": 2, "pairs": 16,
                            "precisions": ["bf16", "fp16"]},
                           {**TINY_RESPONSES, "batch": 2, "pairs": 4, "precisions": ["bf16"]}),
    "memory_images": Part("Is the measured peak that of the plan?", memory.peaks,
                          {"images": [{"model": "SD1.5", "batch_size": 4}, {"model": "SD1.5", "tuning": "full"},
                                      {"model": "SDXL", "gradient_checkpointing": True},
                                      {"model": "SD3.5 Medium", "gradient_checkpointing": True}],
                           "sizes": [], "precision": "bf16"},
                          {"images": [{"model": "SD1.5", "tuning": "full"}], "precision": "fp32"}),
    "memory_large": Part("Is the measured peak that of the plan?", memory.peaks,
                         {"images": [{"model": "FLUX.1-dev", "gradient_checkpointing": True}], "sizes": ["3B"],
                          "image_tokens": 576, "response_tokens": 128, "pairs": 2, "precision": "bf16"},
                         {"images": [], **TINY_RESPONSES}),
    "compile_images": Part("What does torch.compile save, and how long does compiling take?", compiling.images,
                           {"model": "SD1.5", "pairs": 4, "backend": "inductor", **STEP}, {**TINY_STEP, "backend": "eager"}),
    "compile_responses": Part("What does torch.compile save, and how long does compiling take?", compiling.responses,
                              {"size": "3B", "image_tokens": 576, "response_tokens": 128, "pairs": 2,
                               "layouts": ["separate", "shared_prefix"], "backend": "inductor", **STEP},
                              {**TINY_RESPONSES, "layouts": ["shared_prefix"], "backend": "eager"}),
    "optimizers": Part("Which optimizer and which memory format pay?", optimizers.compare,
                       {"model": "SD1.5", "pairs": 4, **STEP,
                        "runs": {"LoRA, adamw_torch": {"optimizer": "adamw_torch"}, "LoRA, fused": {"optimizer": "adamw_torch_fused"},
                                 "LoRA, fused, channels_last": {"optimizer": "adamw_torch_fused", "channels_last": True},
                                 **{f"full, {name}": {"tuning": "full", "optimizer": name}
                                    for name in ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit",
                                                 "paged_adamw_32bit", "adafactor")}}},
                       {**TINY_STEP, "pairs": 1,
                        "runs": {"LoRA, channels_last": {"channels_last": True}, "full, fused": {"tuning": "full"},
                                 "full, 8 bits": {"tuning": "full", "optimizer": "paged_adamw_8bit"}}}),
    "references": Part("What does turning the adapter off and on cost, and is one batch for policy and reference faster?",
                       references.compare,
                       {"images": ["SDXL", "FLUX.1-dev"], "sizes": ["3B"], "batch_model": "SD1.5", "pairs": 4, **STEP},
                       {"images": ["SD1.5"], **TINY_STEP, "pairs": 1}),
    "resume": Part("What of a run is equal if it was killed and resumed?", resuming.compare,
                   {"run": {"model": "shapes-sd", "pairs": "shapes-faithfulness", "steps": 40, "batch_size": 16, "beta": 500.0,
                            "save_every": 10}},
                   {"run": {"steps": 8, "save_every": 2, "batch_size": 2, "lora_rank": 4}}),
    "generation": Part("How many useful tokens per second does mining generate?", generating.bundled,
                       {"tasks": ["ocr", "captioner"], "questions": None, "batch_size": None, "max_new_tokens": None},
                       {"tasks": ["ocr"], "questions": 4, "batch_size": 2, "max_new_tokens": 8}),
}  # fmt: skip
"""Parts by name, in the order in which they run. --parts also takes the beginning of a name."""


def choose(names: list[str]) -> list[str]:
    """Return the names of the parts that begin with one of these.

    Raises:
        ValueError: if none begins with a name.
    """
    for name in names:
        if not any(part.startswith(name) for part in PARTS):
            raise ValueError(f"no part begins with {name!r}. Expected one of {', '.join(PARTS)}")
    return [part for part in PARTS if any(part.startswith(name) for name in names)]


def settings_of(name: str, *, tiny: bool) -> dict[str, Any]:
    """Settings of a part."""
    part = PARTS[name]
    return {**part.settings, **(part.tiny if tiny else {})}
