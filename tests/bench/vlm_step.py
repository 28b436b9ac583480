"""Compare one training step on a vision-language pair with TRL's DPOTrainer: time, memory, loss, and the FLOP bound.

    python -m tests.bench.vlm_step --out docs/benchmarks/vlm-step.json --page docs/background/benchmarks.md   # needs the extra `bench`
    python -m tests.bench.vlm_step --shapes llava --images 128 --completions 32   # one cell

All variants have the same model (random weights, see `vlm_shapes`), rows and batch: LoRA of rank 16 on the language model,
the reference with the adapter disabled, forward and backward in float32 on one thread. The optimizer's step and image
preprocessing are not measured. Time is the CPU time of the process. Variants run in random order within each round, and
the table has the medians. Peak memory is the memory that a step adds to the process. FLOPs are counted by
`FlopCounterMode`. TRL has two code paths: the one for CPUs (trl), and one that runs the head only on completions, as on a
GPU (trl_head). The time is of the second. Memory is measured for both.

An allocator that returns memory to the system causes page faults in some steps and not in others. So the process keeps its
heap (MALLOC_* below) for all variants.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers as hf
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import precompute_reference_log_probs
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.pages import write_tables
from tests.bench.vlm_shapes import PUBLISHED, RANK, SHAPES, Shape, build, largest_speedups, ratios, rows_of, texts

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT = {**HEAP, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment variables of the process: it keeps its heap and has one thread."""

Step = Callable[[], float]


def config_of(pairs: int, **settings: Any) -> TrainConfig:
    """Settings of a run, in float32 if they name no precision."""
    lora = {"lora_rank": RANK, "lora_alpha": RANK, "lora_targets": ADAPTED}
    defaults = {"beta": 0.1, "steps": 1, "precision": "fp32", "reference": "adapter_off", **lora}
    return TrainConfig("bench", "", "bench", batch_size=pairs, **{**defaults, **settings})


def our_step(
    built: tuple[Any, Any],
    rows: list[dict[str, Any]],
    *,
    pair_layout: str,
    cache_vision_features: bool = False,
    **settings: Any,
) -> Step:
    """Our step.

    Args:
        built: model and processor.
        rows: pairs.
        pair_layout, cache_vision_features: as in TrainConfig.
        settings: further settings of TrainConfig.
    """
    config = config_of(len(rows), **settings)
    policy = VisionLanguage(*built, "bench", pair_layout=pair_layout)
    encoded: Any = policy.encode(rows)
    policy.prepare(config)
    randomise_adapter(policy.model)
    if cache_vision_features:
        encoded = policy.cache_vision_features(encoded)
    if config.reference == "precomputed":
        encoded = precompute_reference_log_probs(
            policy, PairStream(encoded, seed=0, length=len(encoded), num_fixed_draws=1), config
        )
    trainer = PreferenceTrainer(policy, config, encoded)
    policy.model.train()

    def step() -> float:
        policy.model.zero_grad(set_to_none=True)
        batch = trainer._prepare_inputs(policy.collate([encoded[n] for n in range(len(rows))]))
        loss = trainer.compute_loss(policy.model, batch)
        loss.backward()
        trainer._metrics["train"].clear()
        return float(loss.detach())

    return step


def trl_step(
    built: tuple[Any, Any],
    shape: Shape,
    rows: list[dict[str, Any]],
    *,
    head: bool,
    precision: str = "fp32",
    checkpointing: bool = False,
) -> Step:
    """TRL's step, with its collator and loss, on the GPU if there is one.

    Args:
        built: model and processor.
        shape, rows: pairs of `vlm_shapes`.
        head: True: the head runs only on completions, as on a GPU.
        precision: fp32 or bf16.
        checkpointing: gradient checkpointing.
    """
    import trl.trainer.utils as internals
    from trl import DPOConfig, DPOTrainer

    model, processor = built
    features = {name: Value("string") for name in ("prompt", "chosen", "rejected")} | {"images": List(Image())}
    trl_rows = texts(shape, rows)
    arguments = DPOConfig(
        output_dir="runs/bench-trl", per_device_train_batch_size=len(rows), use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16", report_to="none", beta=0.1, max_length=None, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    target_modules = rf".*(language_model|text_model).*\.({'|'.join(ADAPTED)})"
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(trl_rows, features=Features(features)),
        processing_class=processor,
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target_modules),
    )
    randomise_adapter(trainer.model)
    trainer.model.train()
    inputs = trainer.data_collator(trl_rows)

    def step() -> float:
        trainer.model.zero_grad(set_to_none=True)
        batch = trainer._prepare_inputs(dict(inputs))
        use_triton = internals._use_triton
        internals._use_triton = (lambda device: True) if head and not torch.cuda.is_available() else use_triton
        try:
            with trainer.compute_loss_context_manager():
                loss = trainer._compute_loss(trainer.model, batch, False)
            loss.backward()
        finally:
            internals._use_triton = use_triton
        return float(loss.detach())

    return step


def randomise_adapter(model: Any) -> None:
    """Fill the adapter with the same random numbers in all variants, each matrix from a separate seed."""
    for number, (_, tensor) in enumerate(sorted((name, t) for name, t in model.named_parameters() if "lora_" in name)):
        with torch.no_grad():
            tensor.copy_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))


OURS: dict[str, dict[str, Any]] = {
    "vision kept": {"pair_layout": "shared_prefix", "reference": "precomputed", "cache_vision_features": True},
    "reference kept": {"pair_layout": "shared_prefix", "reference": "precomputed"},
    "prefix": {"pair_layout": "shared_prefix"},
    "plain": {"pair_layout": "separate"},
}
"""Arguments of our_step."""


def _ours(name: str) -> Callable[..., Step]:
    return lambda shape, rows, tokens: our_step(build(shape, tokens), rows, **OURS[name])


VARIANTS: dict[str, Callable[[Shape, list[dict[str, Any]], int], Step]] = {
    **{name: _ours(name) for name in OURS},
    "trl_head": lambda shape, rows, tokens: trl_step(build(shape, tokens), shape, rows, head=True),
    "trl": lambda shape, rows, tokens: trl_step(build(shape, tokens), shape, rows, head=False),
}


def measure_sizes(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Measure the loss, the FLOPs that torch counts, and the peak memory in MiB that a step adds to the process (Linux)."""
    results: dict[str, dict[str, float]] = {"loss": {}, "counted_flops": {}, "peak_mib": {}}
    for name, step in steps.items():
        step()  # the first step checks the batch and creates what is cached
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        with FlopCounterMode(display=False) as counter:
            results["loss"][name] = step()
        results["peak_mib"][name] = _status("VmHWM") - before
        results["counted_flops"][name] = counter.get_total_flops()
    return results


def _status(name: str) -> float:
    """A value of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure_times(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of each variant in each round. The order is random in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        order = list(steps)
        random.Random(number).shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def measure_cell(shape: Shape, tokens: int, completion: int, rounds: int) -> dict[str, Any]:
    """Measure a cell of the table.

    Its number of pairs gives our step about 800 positions, and is at least one.
    """
    pairs = max(1, 800 // (shape.prompt(tokens) + 2 * completion))
    rows = rows_of(shape, tokens, completion, pairs)
    steps = {name: make(shape, rows, tokens) for name, make in VARIANTS.items()}
    measured = measure_sizes(steps)
    all_seconds = measure_times({name: step for name, step in steps.items() if name != "trl"}, rounds)
    seconds = {name: statistics.median(values) for name, values in all_seconds.items()}
    return add_derived_values(
        {
            "shape": shape.name,
            "image_tokens": shape.image_tokens(tokens),
            "about": tokens,
            "completion": completion,
            "pairs": pairs,
            "cpu_seconds": seconds,
            "all_cpu_seconds": all_seconds,
            **measured,
        }
    )


def add_derived_values(measured: dict[str, Any]) -> dict[str, Any]:
    """Add the speed-up over TRL to a cell, and the FLOP bounds by formula and as counted."""
    size = SHAPES[measured["shape"]], measured["about"], measured["completion"]
    bound, seconds, counted = largest_speedups(*size), measured["cpu_seconds"], measured["counted_flops"]
    speedup = {name: seconds["trl_head"] / seconds[name] for name in bound}
    return {
        **measured,
        "over_trl_head": speedup,
        "flops_allow": bound,
        "share_of_allowed": {name: speedup[name] / bound[name] for name in bound},
        "flops_allow_without_attention": largest_speedups(*size, attention=False),
        "counted_without_attention": {name: counted["trl_head"] / counted[name] for name in bound},
    }


def cell_summary(cell: dict[str, Any]) -> str:
    """Summarise a cell for the terminal."""
    losses = cell["loss"].values()
    lines = [
        f"{cell['shape']}, {cell['image_tokens']} tokens of the image, completions {cell['completion']}, "
        f"{cell['pairs']} pairs: losses {min(losses):.6f} to {max(losses):.6f}"
    ]
    for name, memory in cell["peak_mib"].items():
        seconds, bound = cell["cpu_seconds"].get(name), cell["flops_allow"].get(name)
        speedup = (
            f"x{cell['over_trl_head'][name]:.2f} of x{bound:.2f}, {cell['share_of_allowed'][name]:.0%}" if bound else ""
        )
        lines.append(f"  {name:16}{f'{1000 * seconds:7.0f} ms' if seconds else '':12}{speedup:24}+{memory:.0f} MiB")
    return "\n".join(lines)


COLUMNS = {
    "plain": "separate",
    "prefix": "shared prefix",
    "reference kept": "precomputed reference",
    "vision kept": "cached vision features",
}
"""Names of the variants in a cell and on the page."""


def page(cells: list[dict[str, Any]]) -> str:
    """Format the cells as tables in Markdown: speed-up and FLOP bound, then memory."""
    lines = [f"{len(cells)} of the {9 * len(SHAPES)} cells have been measured.", ""]
    for name in SHAPES:
        shape_cells = [cell for cell in cells if cell["shape"] == name]
        if not shape_cells:
            continue
        published_name, vision, head = PUBLISHED[name]
        model_ratios = ratios(SHAPES[name], 576)
        lines += [
            f"### {published_name}",
            "",
            f"Multiply-adds relative to the body: {model_ratios[0]:.2f} for vision per image token, {model_ratios[1]:.3f} for the head (published: {vision:.2f}, "
            f"{head:.3f}).",
            "",
            "| image tokens x completion (pairs) | TRL | "
            + " | ".join(COLUMNS.values())
            + " | memory: TRL, shared prefix, cached vision features |",
            "|---|---|" + "---|" * (len(COLUMNS) + 1),
        ]
        for cell in shape_cells:
            speedups = [
                f"{cell['over_trl_head'][k]:.2f} of {cell['flops_allow'][k]:.2f}, {cell['share_of_allowed'][k]:.0%}"
                for k in COLUMNS
            ]
            peaks = cell["peak_mib"]
            memory = (
                f"{peaks['trl']:.0f} / {peaks['trl_head']:.0f}, {peaks['prefix']:.0f}, {peaks['vision kept']:.0f} MiB"
            )
            size = f"{cell['image_tokens']} x {cell['completion']} ({cell['pairs']})"
            lines.append(
                " | ".join([f"| {size}", f"{1000 * cell['cpu_seconds']['trl_head']:.0f} ms", *speedups, f"{memory} |"])
            )
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.bench.vlm_step", *sys.argv[1:]], {**os.environ, **ENVIRONMENT}
        )
    integers = lambda text: [int(n) for n in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--images", type=integers, default=[128, 576, 1024], help="approximate number of image tokens")
    parser.add_argument("--completions", type=integers, default=[32, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the cells. Cells that it has are not measured again")
    parser.add_argument("--page", type=Path, help="page to write the tables to, between its markers")
    options = parser.parse_args()
    hf.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells = json.loads(options.out.read_text())["cells"] if options.out and options.out.exists() else []
    cells = [add_derived_values(measured) for measured in cells]
    done = {(cell["shape"], cell["image_tokens"], cell["completion"]) for cell in cells}
    for tokens, completion, name in itertools.product(options.images, options.completions, options.shapes):
        shape = SHAPES[name]
        if (name, shape.image_tokens(tokens), completion) in done:
            continue
        cells.append(measure_cell(shape, tokens, completion, options.rounds))
        print(cell_summary(cells[-1]), flush=True)
        if options.out:
            about = {"torch": torch.__version__, "transformers": hf.__version__, "rounds": options.rounds}
            options.out.write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")
    if options.page:
        write_tables(options.page, "steps", page(cells))


if __name__ == "__main__":
    main()
