"""Compare a shared prefix with separate sequences on language models whose layers have a state.

    python -m tests.bench.recurrent_prefix --out docs/benchmarks/recurrent-prefix.json --page docs/background/benchmarks.md   # 3 minutes

The models have random weights, four layers of width 256, and a LoRA of rank 16: Qwen3 (attention only), Qwen3.5 (three gated
delta nets, one attention) and LFM2 (two short convolutions, two attentions). The prompt stands for images and text. A step is
the policy's log-probs of one pair and their backward pass, in float32 on one thread, with PyTorch's kernels. Both layouts run
in each round, in random order. Time is the CPU time of the process. The ratio is that of separate sequences to a shared
prefix, of which the table has the median.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.bench.pages import write_tables
from tests.contracts.tiny_vlms import tokenizer

LAYOUTS = ("shared_prefix", "separate")
SIZES = [(256, 64), (1024, 64), (1024, 256)]
"""Tokens of the prompt and of each completion."""
TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "initializer_range": 0.1,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA_NET: dict[str, Any] = {
    "head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
CONVOLUTIONS: dict[str, Any] = {
    "layer_types": ["conv", "full_attention"] * 2,
    "block_auto_adjust_ff_dim": False,
}
MODELS: dict[str, Callable[[], Any]] = {
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, head_dim=32)),
    "Qwen3.5": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**TEXT, **DELTA_NET)),
    "LFM2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**TEXT, **CONVOLUTIONS)),
}


def policy_of(model: str, layout: str) -> VisionLanguage:
    """Return a policy with a LoRA that changes the model. Both layouts have the same weights."""
    torch.manual_seed(0)
    policy = VisionLanguage(MODELS[model](), tokenizer("llama"), model, pair_layout=layout)
    policy.prepare(TrainConfig("m", "p", "o", beta=0.1, lora_rank=16, lora_alpha=16))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return policy


def row_of(prompt: int, completion: int) -> dict[str, Any]:
    """Return an encoded pair of random tokens. Rejected is a quarter shorter than chosen."""
    generator = torch.Generator().manual_seed(0)
    lengths = {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion * 3 // 4}
    ids = {name: torch.randint(3, 4096, (length,), generator=generator) for name, length in lengths.items()}
    return {"id": "row", **ids, "types": {}, "images": {}}


def step(policy: VisionLanguage, batch: dict[str, Any]) -> float:
    """Run a step. Returns its CPU seconds."""
    policy.model.zero_grad(set_to_none=True)
    start = time.process_time()
    log_probs = policy.log_probs(policy.model, batch)
    (log_probs.chosen - log_probs.rejected).sum().backward()
    return time.process_time() - start


def gradient(policy: VisionLanguage) -> torch.Tensor:
    """Return the gradient of the LoRA as one vector."""
    return torch.cat([weight.grad.flatten() for weight in policy.model.parameters() if weight.grad is not None])


def measure(model: str, prompt: int, completion: int, *, rounds: int) -> dict[str, Any]:
    """Measure both layouts of one model on one pair."""
    policies = {layout: policy_of(model, layout) for layout in LAYOUTS}
    row, order = row_of(prompt, completion), random.Random(0)
    batches = {layout: policy.collate([row]) for layout, policy in policies.items()}
    for layout in LAYOUTS:  # not timed: the first batch has the check of the layout
        step(policies[layout], batches[layout])
    shared, separate = (gradient(policies[layout]) for layout in LAYOUTS)
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(rounds):
        for layout in order.sample(LAYOUTS, 2):
            seconds[layout].append(step(policies[layout], batches[layout]))
    ratios = [slow / fast for fast, slow in zip(*(seconds[layout] for layout in LAYOUTS), strict=True)]
    return {
        "model": model,
        "prompt": prompt,
        "completion": completion,
        "cpu_seconds": {layout: round(statistics.median(values), 4) for layout, values in seconds.items()},
        "all_cpu_seconds": seconds,
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
        "relative_difference_of_gradients": float((shared - separate).norm() / separate.norm()),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Return the table of the page."""
    lines = [
        "| model | prompt | completions | shared | separate | ratio | lowest to highest ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        seconds, ratios = cell["cpu_seconds"], cell["ratios"]
        lines.append(
            f"| {cell['model']} | {cell['prompt']} | {cell['completion']} | {seconds['shared_prefix']:.2f} s "
            f"| {seconds['separate']:.2f} s | {cell['ratio']:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [measure(model, *size, rounds=options.rounds) for model in MODELS for size in SIZES]
    results = {"torch": torch.__version__, "transformers": hf.__version__, "rounds": options.rounds, "cells": cells}
    print(table(cells))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.page:
        write_tables(options.page, "states", table(cells))


if __name__ == "__main__":
    main()
