"""Count the FLOPs of a training step of published models, and the largest speed-up over the peers that they allow.

    python -m tests.bench.step_flops --out docs/benchmarks/step-flops.json --page docs/background/benchmarks.md

No weights and no GPU are needed. Image generators: the parts are counted on the meta device, for one pair at the native resolution.
Vision-language models: by the formula of `vlm_shapes`, with the published configurations, for one pair with one image and 16 words
of prompt. TRL runs the vision tower four times per pair, ours once. A LoRA of an image generator is not counted: it is below 1 %.
"""

from __future__ import annotations

import json
from typing import Any

import diffusers
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from dpo_mm.training.meta_execution import CudaRules, MixedMetaMode
from dpo_mm.training.prompt_keys import example_image, example_prompt
from tests.bench.diffusion_step import SIZES, largest_speedups, step_gflops
from tests.bench.diffusion_step import flops as part_gflops
from tests.bench.meta_parts import QWEN2_5_TEXT, qwen2_5_tower
from tests.bench.pages import counting_options, write_tables
from tests.bench.published_models import MODELS
from tests.bench.vlm_shapes import RANK, SHAPES, WINDOW, Cost, flops_by_variant, speedups_over_trl
from tests.bench.vlm_step import COLUMNS

IMAGES = {"SD1.5, 512 px": "sd15", "SDXL, 1024 px": "sdxl"}
"""Models with a published loop, and their names in diffusion_step.SIZES."""
IMAGE_TOKENS, RESPONSE = (576, 1024), 128


def response_cost(size: str, image_tokens: int, *, attention: bool = True) -> Cost:
    """Multiply-adds of a row of Qwen2.5-VL. size: a key of QWEN2_5_TEXT. attention=False leaves attention out."""
    text, tower = QWEN2_5_TEXT[size], qwen2_5_tower(size)
    width, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    key_value = width // text["num_attention_heads"] * text["num_key_value_heads"]
    linear = [(width, width)] * 2 + [(width, key_value)] * 2 + [(width, inner)] * 3
    seen, merged = tower["hidden_size"], tower["spatial_merge_size"] ** 2
    patches, full = image_tokens * merged, len(tower["fullatt_block_indexes"])
    attended = full * patches + (tower["depth"] - full) * min(patches, WINDOW)
    layer = 4 * seen**2 + 3 * seen * tower["intermediate_size"]
    patch_embedding = seen * 3 * tower["patch_size"] ** 2 * tower["temporal_patch_size"]
    vision = patches * (tower["depth"] * layer + 2 * seen * attended * attention + patch_embedding)
    return Cost(
        body=layers * sum(a * b for a, b in linear),
        first=width * (width + 2 * key_value),
        lora=layers * RANK * sum(a + b for a, b in linear),
        head=width * text["vocab_size"],
        attention=2 * layers * width * attention,
        vision=vision + image_tokens * ((seen * merged) ** 2 + seen * merged * width),
    )


def response_step_flops(
    size: str, image_tokens: int, response: int, *, checkpointing: bool = False, attention: bool = True
) -> dict[str, float]:
    """FLOPs of a step of Qwen2.5-VL on one pair, by variant of `vlm_shapes.STEPS`."""
    costs = response_cost(size, image_tokens, attention=attention)
    prompt = SHAPES["qwen2_5_vl"].prompt(image_tokens)
    return flops_by_variant(costs, prompt, response, checkpointing=checkpointing)


def denoiser_gflops(policy: Any) -> float:
    """FLOPs (10^9) of one forward pass of a denoiser on one image. The policy is on the meta device, with its encoders."""
    with torch.no_grad(), MixedMetaMode(), CudaRules():
        latents = policy.latent_scale.normalise(policy.encode_images([example_image(policy)])[0])
        prompt = {
            name: v.to(policy.dtype) if v.is_floating_point() else v for name, v in example_prompt(policy).items()
        }
    timestep = torch.zeros(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), MixedMetaMode(), CudaRules():
        policy.denoise(policy.model, latents.to(policy.dtype), timestep, prompt)
    return counter.get_total_flops() / 1e9


def count_images() -> dict[str, Any]:
    """Parts and steps of image generators, 10^9 FLOPs."""
    counted = {name: part_gflops(SIZES[size]) for name, size in IMAGES.items()}
    rows = {name: {"parts": parts, **_steps(parts)} for name, parts in counted.items()}
    denoiser = denoiser_gflops(MODELS["FLUX.1-dev"].build("bf16"))
    steps = _steps({"denoiser": denoiser, "autoencoder": 0.0, "text": 0.0})
    for each in steps.values():  # there is no published loop
        del each["step_gflop"]["published"], each["allow"]
    return {**rows, "FLUX.1-dev, 1024 px": {"parts": {"denoiser": denoiser}, **steps}}


def _steps(parts: dict[str, float]) -> dict[str, Any]:
    return {
        name: {
            "step_gflop": step_gflops(parts, checkpointing=checkpointing),
            "allow": largest_speedups(parts, checkpointing=checkpointing),
        }
        for name, checkpointing in (("plain", False), ("checkpointing", True))
    }


def count_responses() -> dict[str, Any]:
    """Steps of vision-language models with gradient checkpointing, 10^9 FLOPs."""
    rows = {}
    for size in ("3B", "7B"):
        for tokens in IMAGE_TOKENS:
            steps = response_step_flops(size, tokens, RESPONSE, checkpointing=True)
            name = f"Qwen2.5-VL-{size}, {tokens} image tokens"
            gflop = {variant: value / 1e9 for variant, value in steps.items()}
            rows[name] = {"step_gflop": gflop, "allow": speedups_over_trl(steps)}
    return rows


def page(results: dict[str, Any]) -> str:
    """Format the counts as tables in Markdown."""
    lines = [
        "| model, one pair | published loop, TFLOP | reference in the step | precomputed reference | speed-ups allowed |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["images"].items():
        for title, kind in (("", "plain"), (", checkpointing", "checkpointing")):
            steps, allowed = row[kind]["step_gflop"], row[kind].get("allow")
            cells = [f"{steps[k] / 1000:.1f}" if k in steps else "–" for k in ("published", "online", "precomputed")]
            bounds = " and ".join(f"{value:.2f}" for value in allowed.values()) if allowed else "–"
            lines.append(f"| {name}{title} | {' | '.join(cells)} | {bounds} |")
    names = ("trl_head", *COLUMNS)
    lines += [
        "",
        f"| model, one pair, responses of {RESPONSE} tokens, checkpointing | TRL, TFLOP | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, row in results["responses"].items():
        cells = [f"{row['step_gflop'][k] / 1000:.1f}" for k in names]
        bounds = ["", *(f" ({row['allow'][k]:.2f}×)" for k in COLUMNS)]
        lines.append(f"| {name} | {' | '.join(f'{a}{b}' for a, b in zip(cells, bounds, strict=True))} |")
    return "\n".join(lines)


def main() -> None:
    options = counting_options(__doc__)
    about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": hf.__version__}
    results = {"command": "python -m tests.bench.step_flops", **about, "images": count_images()}
    results["responses"] = count_responses()
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.page:
        write_tables(options.page, "step-flops", page(results))


if __name__ == "__main__":
    main()
