"""One full training step on a vision-language pair, ours beside TRL's DPOTrainer: time, memory, loss, and what FLOPs allow.

    python -m tests.bench.vlm_step --out docs/benchmarks/vlm-step.json --page docs/background/benchmarks.md   # needs the extra `bench`
    python -m tests.bench.vlm_step --shapes llava --images 128 --completions 32   # a cell

The same model (random weights, see `vlm_shapes`), rows and batch on all sides; LoRA of rank 16 on the language model, the
reference asked with the adapter off; forward and backward, float32, one thread, without the optimizer's step and without
image preprocessing. Time is the process's CPU time; variants take turns in random order within each round, and the table
is of medians. Peak memory is what a step adds to the process, FLOPs are as `FlopCounterMode` counts them. TRL has two ways:
its CPU path, and (trl_head) the head on completions alone, as on a GPU; the second is timed, both are weighed.

An allocator that hands memory back page-faults in some steps and not in others; the process therefore keeps its heap
(MALLOC_* below), on all sides alike.
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
from tests.bench.vlm_shapes import PUBLISHED, RANK, SHAPES, Shape, allowed, build, ratios, rows_of, texts

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_ARENA_MAX": "1"}
PLACE = {**HEAP, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The process's surroundings: see above, and one thread."""

Step = Callable[[], float]


def ours(shape: Shape, rows: list[dict[str, Any]], tokens: int, **options: Any) -> Step:
    """Our step: layout plain or shared, reference online or kept, vision features kept or not."""
    keep, reference = options.pop("cache_vision_features", False), options.pop("reference", "adapter_off")
    config = TrainConfig(
        "bench", "", "bench", beta=0.1, batch_size=len(rows), steps=1, lora_rank=RANK, lora_alpha=RANK,
        lora_targets=ADAPTED, reference=reference,
    )  # fmt: skip
    policy = VisionLanguage(*build(shape, tokens), "bench", **options)
    encoded: Any = policy.encode(rows)
    policy.prepare(config)
    stir(policy.model)
    if keep:
        encoded = policy.cache_vision_features(encoded)
    if reference == "precomputed":
        encoded = precompute_reference_log_probs(
            policy, PairStream(encoded, seed=0, length=len(encoded), num_fixed_draws=1), config
        )
    trainer = PreferenceTrainer(policy, config, encoded)
    policy.model.train()

    def step() -> float:
        policy.model.zero_grad(set_to_none=True)
        loss = trainer.compute_loss(policy.model, policy.collate([encoded[n] for n in range(len(rows))]))
        loss.backward()
        return float(loss.detach())

    return step


def trl(shape: Shape, rows: list[dict[str, Any]], tokens: int, *, head: bool) -> Step:
    """TRL's own collator and loss. head: its GPU path, where the head sees completions alone."""
    import trl.trainer.utils as internals
    from trl import DPOConfig
    from trl import DPOTrainer as Theirs

    model, processor = build(shape, tokens)
    features = {name: Value("string") for name in ("prompt", "chosen", "rejected")} | {"images": List(Image())}
    plain = texts(shape, rows)
    arguments = DPOConfig(
        output_dir="runs/bench-trl", per_device_train_batch_size=len(rows), use_cpu=True, bf16=False, report_to="none",
        beta=0.1, max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    where = rf".*(language_model|text_model).*\.({'|'.join(ADAPTED)})"
    trainer = Theirs(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(plain, features=Features(features)),
        processing_class=processor,
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=where),
    )
    stir(trainer.model)
    trainer.model.train()
    inputs = trainer.data_collator(plain)

    def step() -> float:
        trainer.model.zero_grad(set_to_none=True)
        before = internals._use_triton
        internals._use_triton = (lambda device: True) if head else before
        try:
            loss = trainer._compute_loss(trainer.model, inputs, False)
            loss.backward()
        finally:
            internals._use_triton = before
        return float(loss.detach())

    return step


def stir(model: Any) -> None:
    """The same adapter on all sides, away from zero: each matrix from its own seed."""
    for number, (_, tensor) in enumerate(sorted((name, t) for name, t in model.named_parameters() if "lora_" in name)):
        with torch.no_grad():
            tensor.copy_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))


VARIANTS: dict[str, Callable[..., Step]] = {
    "vision kept": lambda *of: ours(
        *of, pair_layout="shared_prefix", reference="precomputed", cache_vision_features=True
    ),
    "reference kept": lambda *of: ours(*of, pair_layout="shared_prefix", reference="precomputed"),
    "prefix": lambda *of: ours(*of, pair_layout="shared_prefix"),
    "plain": lambda *of: ours(*of, pair_layout="separate"),
    "trl_head": lambda *of: trl(*of, head=True),
    "trl": lambda *of: trl(*of, head=False),
}


def sizes(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Loss, FLOPs as torch counts them, and what a step adds to the process's memory at most, MiB (Linux)."""
    found: dict[str, dict[str, float]] = {"loss": {}, "counted_flops": {}, "peak_mib": {}}
    for name, step in steps.items():
        step()  # the check of the first batch, and what is made once
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        with FlopCounterMode(display=False) as counter:
            found["loss"][name] = step()
        found["peak_mib"][name] = _status("VmHWM") - before
        found["counted_flops"][name] = counter.get_total_flops()
    return found


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def times(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round, one after the other in random order."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        order = list(steps)
        random.Random(number).shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            found[name].append(time.process_time() - start)
    return found


def cell(shape: Shape, tokens: int, completion: int, rounds: int) -> dict[str, Any]:
    """One cell of the table; as many pairs as make our sequences of about 800 positions, at least one."""
    pairs = max(1, 800 // (shape.prompt(tokens) + 2 * completion))
    rows = rows_of(shape, tokens, completion, pairs)
    steps = {name: make(shape, rows, tokens) for name, make in VARIANTS.items()}
    measured = sizes(steps)
    taken = times({name: step for name, step in steps.items() if name != "trl"}, rounds)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    return derived(
        {
            "shape": shape.name,
            "image_tokens": shape.image_tokens(tokens),
            "about": tokens,
            "completion": completion,
            "pairs": pairs,
            "cpu_seconds": seconds,
            "all_cpu_seconds": taken,
            **measured,
        }
    )


def derived(raw: dict[str, Any]) -> dict[str, Any]:
    """A cell with what follows from its measurements: gain over TRL, what FLOPs allow by formula and as counted."""
    where = SHAPES[raw["shape"]], raw["about"], raw["completion"]
    bound, seconds, counted = allowed(*where), raw["cpu_seconds"], raw["counted_flops"]
    gained = {name: seconds["trl_head"] / seconds[name] for name in bound}
    return {
        **raw,
        "over_trl_head": gained,
        "flops_allow": bound,
        "share_of_allowed": {name: gained[name] / bound[name] for name in bound},
        "flops_allow_without_attention": allowed(*where, attention=False),
        "counted_without_attention": {name: counted["trl_head"] / counted[name] for name in bound},
    }


def told(found: dict[str, Any]) -> str:
    """A cell as lines for the terminal."""
    losses = found["loss"].values()
    lines = [
        f"{found['shape']}, {found['image_tokens']} tokens of the image, completions {found['completion']}, "
        f"{found['pairs']} pairs: losses {min(losses):.6f} to {max(losses):.6f}"
    ]
    for name, memory in found["peak_mib"].items():
        seconds, bound = found["cpu_seconds"].get(name), found["flops_allow"].get(name)
        share = (
            f"x{found['over_trl_head'][name]:.2f} of x{bound:.2f}, {found['share_of_allowed'][name]:.0%}"
            if bound
            else ""
        )
        lines.append(f"  {name:16}{f'{1000 * seconds:7.0f} ms' if seconds else '':12}{share:24}+{memory:.0f} MiB")
    return "\n".join(lines)


COLUMNS = {
    "plain": "separate",
    "prefix": "shared prefix",
    "reference kept": "precomputed reference",
    "vision kept": "cached vision features",
}
"""A cell's names of the variants, and the page's."""


def page(cells: list[dict[str, Any]]) -> str:
    """The cells as tables for a page: gain and what FLOPs allow, then memory."""
    lines = [f"{len(cells)} of the {9 * len(SHAPES)} cells have been measured.", ""]
    for name in SHAPES:
        found = [c for c in cells if c["shape"] == name]
        if not found:
            continue
        like, vision, head = PUBLISHED[name]
        own = ratios(SHAPES[name], 576)
        lines += [
            f"### {like}",
            "",
            f"Multiply-adds relative to the body: {own[0]:.2f} for vision per image token, {own[1]:.3f} for the head (published: {vision:.2f}, "
            f"{head:.3f}).",
            "",
            "| image tokens x completion (pairs) | TRL | "
            + " | ".join(COLUMNS.values())
            + " | memory: TRL, shared prefix, cached vision features |",
            "|---|---|" + "---|" * (len(COLUMNS) + 1),
        ]
        for c in found:
            gains = [
                f"{c['over_trl_head'][k]:.2f} of {c['flops_allow'][k]:.2f}, {c['share_of_allowed'][k]:.0%}"
                for k in COLUMNS
            ]
            kept = c["peak_mib"]
            memory = f"{kept['trl']:.0f} / {kept['trl_head']:.0f}, {kept['prefix']:.0f}, {kept['vision kept']:.0f} MiB"
            where = f"{c['image_tokens']} x {c['completion']} ({c['pairs']})"
            lines.append(
                " | ".join([f"| {where}", f"{1000 * c['cpu_seconds']['trl_head']:.0f} ms", *gains, f"{memory} |"])
            )
        lines.append("")
    return "\n".join(lines).strip()


def drawn(path: Path, cells: list[dict[str, Any]]) -> None:
    """Put the tables between the page's markers."""
    before, _, rest = path.read_text().partition("<!-- steps -->")
    _, end, after = rest.partition("<!-- /steps -->")
    assert end, f"{path}: no markers"
    path.write_text(f"{before}<!-- steps -->\n{page(cells)}\n{end}{after}")


def main() -> None:
    if any(os.environ.get(name) != value for name, value in PLACE.items()):
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.bench.vlm_step", *sys.argv[1:]], {**os.environ, **PLACE}
        )
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--images", type=numbers, default=[128, 576, 1024], help="tokens of the image, about")
    parser.add_argument("--completions", type=numbers, default=[32, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="cells that are in it already are kept")
    parser.add_argument("--page", type=Path, help="put the tables between this page's markers")
    given = parser.parse_args()
    hf.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells = json.loads(given.out.read_text())["cells"] if given.out and given.out.exists() else []
    cells = [derived(one) for one in cells]
    done = {(c["shape"], c["image_tokens"], c["completion"]) for c in cells}
    for tokens, completion, name in itertools.product(given.images, given.completions, given.shapes):
        shape = SHAPES[name]
        if (name, shape.image_tokens(tokens), completion) in done:
            continue
        cells.append(cell(shape, tokens, completion, given.rounds))
        print(told(cells[-1]), flush=True)
        if given.out:
            about = {"torch": torch.__version__, "transformers": hf.__version__, "rounds": given.rounds}
            given.out.write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")
    if given.page:
        drawn(given.page, cells)


if __name__ == "__main__":
    main()
