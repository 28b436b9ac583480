"""Count what training published models takes on a GPU, and compare with measured runs.

    python -m tests.bench.what_fits --out docs/benchmarks/what-fits.json --page docs/how-to/what-fits.md

Everything is counted on the meta device (`dpo_mm.training.memory_estimate`), with the models of `published_models`. No weights are
needed. One pair per step, at the native resolution of an image generator, or 1,024 image tokens, 256 prompt tokens and 256 tokens per
response. Cells that the JSON file has are not counted again. A full run whose weights, gradients and optimizer state alone exceed 80
GB is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import diffusers
import torch
import transformers as hf

from dpo_mm.training.memory_estimate import Counts, count_images, count_responses
from dpo_mm.training.memory_plan import USABLE
from tests.bench.pages import counting_options, write_tables
from tests.bench.published_models import MODELS, config_of, parameters, response_row

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)
COLUMNS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, checkpointing": {"gradient_checkpointing": True},
    "LoRA, checkpointing, nf4": {"gradient_checkpointing": True, "quantize": "nf4"},
    "full, checkpointing": {"gradient_checkpointing": True, "tuning": "full"},
    "full, checkpointing, precomputed, 8-bit Adam": {
        "gradient_checkpointing": True, "tuning": "full", "reference": "precomputed", "fixed_draws_per_row": 1,
        "optimizer": "adamw_8bit",
    },
}  # fmt: skip
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MEASURED: dict[str, dict[str, Any]] = {
    "SD1.5, 8 pairs": {"model": "SD1.5", "settings": {"batch_size": 8}, "gib": 19.1, "is": "peak of a run"},
    "SDXL, 4 pairs, checkpointing": {
        "model": "SDXL", "settings": {"batch_size": 4, "gradient_checkpointing": True}, "gib": 5589 / 1024,
        "is": "peak above the weights, without optimizer",
    },
    "FLUX.1-dev, 1 pair, checkpointing": {
        "model": "FLUX.1-dev", "settings": {"gradient_checkpointing": True}, "gib": 26.9, "is": "peak without optimizer",
    },
    "Qwen2.5-VL-3B, 2 pairs, 576 image tokens, responses of 128 tokens, checkpointing": {
        "model": "Qwen2.5-VL-3B", "gib": 8.3, "is": "peak without optimizer",
        "settings": {"batch_size": 2, "gradient_checkpointing": True, "lora_targets": ADAPTED},
        "row": {"image_tokens": 576, "prompt_words": 16, "response_words": 128},
    },
}  # fmt: skip
"""Peaks on one H100, torch 2.11, bf16."""


def count(name: str, settings: dict[str, Any], row: dict[str, int] | None = None) -> Counts:
    """Count a step of a model with these settings of TrainConfig, without `quantize`."""
    config = config_of(name, **{key: value for key, value in settings.items() if key != "quantize"})
    policy = MODELS[name].build("bf16" if config.tuning == "lora" else "fp32")
    if MODELS[name].modality == "image":
        policy.prepare(config)
        return count_images(policy, config)
    encoded = response_row(policy, **(row or {}))
    policy.prepare(config)
    return count_responses(policy, config, encoded)


def compare_with_measured(name: str) -> dict[str, Any]:
    """Estimate a measured run."""
    cell = MEASURED[name]
    memory = count(cell["model"], cell["settings"], cell.get("row")).memory(
        config_of(cell["model"], **cell["settings"])
    )
    parts = {"peak of a run": memory.training, "peak without optimizer": memory.training - memory.optimizer}
    estimate = parts.get(cell["is"], memory.step) / GIB
    return {"what": cell["is"], "measured_gib": cell["gib"], "estimate_gib": estimate, "ratio": estimate / cell["gib"]}


def fill_columns(name: str) -> dict[str, dict[str, float] | None]:
    """Bytes of each column of a model, in GiB. None: it needs more than 80 GB for weights, gradients and optimizer alone."""
    counted: dict[tuple[str, bool], Counts] = {}
    cells: dict[str, dict[str, float] | None] = {}
    for column, settings in COLUMNS.items():
        tuning, checkpointing = settings.get("tuning", "lora"), settings.get("gradient_checkpointing", False)
        if tuning == "full" and parameters(name) * 1e9 * 10 > CARDS[-1] * GIB:
            cells[column] = None
            continue
        if (tuning, checkpointing) not in counted:
            counted[tuning, checkpointing] = count(name, settings)
        memory = counted[tuning, checkpointing].memory(config_of(name, **settings))
        values = {**dataclasses.asdict(memory), "training": memory.training}
        cells[column] = {part: value / GIB for part, value in values.items()}
    return cells


def smallest_card(gib: float) -> str:
    """The smallest card on which tensors of this size fit."""
    return next((f"{card}" for card in CARDS if gib <= USABLE * card), "more")


def page(results: dict[str, Any]) -> str:
    """Format the results as tables in Markdown."""
    short = {"LoRA": "LoRA", "LoRA, checkpointing": "LoRA, checkpointing", "LoRA, checkpointing, nf4": "nf4, checkpointing",
             "full, checkpointing": "full", "full, checkpointing, precomputed, 8-bit Adam": "full, smallest"}  # fmt: skip
    lines = [
        f"| model | parameters, 10⁹ (published) | {' | '.join(short.values())} | encoding, bf16 / nf4 |",
        "|---|---|" + "---|" * (len(short) + 1),
    ]
    for name in MODELS:
        model = results["models"][name]
        cells = [model["columns"][column] for column in short]
        texts = [
            "more" if cell is None else f"{cell['training']:.1f} → {smallest_card(cell['training'])}" for cell in cells
        ]
        encoding = [f"{cells[n]['encoding']:.1f}" if cells[n]["encoding"] else "–" for n in (0, 2)]
        count_text = f"{model['parameters']:.2f} ({MODELS[name].parameters:g})"
        lines.append(f"| {name} | {count_text} | {' | '.join(texts)} | {' / '.join(encoding)} |")
    lines += [
        "",
        "| measured on an H100 | what | measured, GiB | computed, GiB | computed / measured |",
        "|---|---|---|---|---|",
    ]
    for name, cell in results["measured"].items():
        figures = f"{cell['measured_gib']:.1f} | {cell['estimate_gib']:.1f} | {cell['ratio']:.3f}"
        lines.append(f"| {name} | {cell['what']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    options = counting_options(__doc__)
    about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": hf.__version__}
    results = json.loads(options.out.read_text()) if options.out.exists() else {**about, "measured": {}, "models": {}}

    def save() -> None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    for name in MEASURED:
        if name not in results["measured"]:
            results["measured"][name] = compare_with_measured(name)
            print(name, results["measured"][name], flush=True)
            save()
    for name in MODELS:
        if name not in results["models"]:
            start = time.process_time()
            columns = fill_columns(name)
            results["models"][name] = {
                "parameters": parameters(name),
                "columns": columns,
                "seconds": time.process_time() - start,
            }
            print(name, {k: v and round(v["training"], 1) for k, v in columns.items()}, flush=True)
            save()
    if options.page:
        write_tables(options.page, "fits", page(results))


if __name__ == "__main__":
    main()
