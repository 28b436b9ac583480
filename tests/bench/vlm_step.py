"""One full training step on a vision-language pair, ours beside TRL's DPOTrainer: time, memory, loss, and what FLOPs allow.

    python -m tests.bench.vlm_step --out docs/benchmarks/vlm-step.json        # needs the extra `bench`
    python -m tests.bench.vlm_step --prompts 128 --completions 32 --rounds 3  # a cell

The same LLaVA-shaped model (random weights), rows and batch; LoRA of rank 16 on the language model, the reference asked
with the adapter off; forward and backward, float32, CPU, without the optimizer's step and without image preprocessing.
Variants run in random order within each round, and the table is of medians; peak memory is what a step adds to the
process, measured apart. TRL has two ways: its CPU path, and (trl_head) the head on completions alone, as on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers as hf
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from PIL import Image as Pictures
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode

from dpo_mm.collate import PairStream
from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm import VisionLanguage
from dpo_mm.reference import keep_reference
from dpo_mm.trainer import DPOTrainer

PATCH, VOCABULARY, WIDTH, LAYERS, INNER, HEADS, GROUPS = 14, 8192, 512, 8, 1376, 8, 4
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(side: int) -> tuple[Any, Any]:
    """A random LLaVA for pictures of side x side patches, the head 13 % of its body as in models of 2 to 7 billion."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(VOCABULARY - len(special)))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens={"image_token": "<image>"}, **names
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=side * PATCH, patch_size=PATCH),
        text_config=hf.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            vocab_size=VOCABULARY,
            max_position_embeddings=8192,
        ),
        image_token_id=words["<image>"],
        tie_word_embeddings=False,
    )
    shape = {"height": side * PATCH, "width": side * PATCH}
    pixels = hf.CLIPImageProcessor(size=shape, crop_size=shape)
    more = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(config), hf.LlavaProcessor(pixels, tokenizer, patch_size=PATCH, **more)


def rows_of(side: int, prompt: int, completion: int, pairs: int) -> list[dict[str, Any]]:
    """Pairs of random words: prompts of so many tokens, image included, completions of so many each."""
    rng = random.Random(0)
    say = lambda count: " ".join(f"w{rng.randrange(VOCABULARY - 5)}" for _ in range(count))
    size = (side * PATCH, side * PATCH, 3)
    pictures = [np.random.default_rng(n).integers(0, 255, size, np.uint8) for n in range(pairs)]
    return [
        {
            "id": str(n),
            "images": [Pictures.fromarray(picture)],
            "prompt": "<image> " + say(prompt - side * side),
            "chosen": " " + say(completion - 1) + " </s>",
            "rejected": " " + say(completion - 1) + " </s>",
        }
        for n, picture in enumerate(pictures)
    ]


Step = Callable[[], float]


def ours(side: int, rows: list[dict[str, Any]], **options: Any) -> Step:
    """Our step: layout plain or shared, reference online or kept, vision features kept or not."""
    keep, reference = options.pop("keep_features", False), options.pop("reference", "adapter_off")
    config = TrainConfig(
        "bench", "", "bench", beta=0.1, batch_size=len(rows), steps=1, lora_targets=ADAPTED, reference=reference
    )
    model, processor = build(side)
    policy = VisionLanguage(model, processor, "bench", **options)
    encoded: Any = policy.encode([{**row, "prompt": row["prompt"].removeprefix("<image>")} for row in rows])
    policy.prepare(config)
    stir(policy.model)
    if keep:
        encoded = policy.keep_features(encoded)
    if reference == "precomputed":
        encoded = keep_reference(policy, PairStream(encoded, seed=0, length=len(encoded), draws=1), config)
    trainer = DPOTrainer(policy, config, encoded)
    policy.model.train()

    def step() -> float:
        policy.model.zero_grad(set_to_none=True)
        loss = trainer.compute_loss(policy.model, policy.collate([encoded[n] for n in range(len(rows))]))
        loss.backward()
        return float(loss.detach())

    return step


def trl(side: int, rows: list[dict[str, Any]], *, head: bool) -> Step:
    """TRL's own collator and loss. head: its GPU path, where the head sees completions alone."""
    import trl.trainer.utils as internals
    from trl import DPOConfig
    from trl import DPOTrainer as Theirs

    model, processor = build(side)
    features = {
        "prompt": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "images": List(Image()),
    }
    plain = [{name: row[name] for name in features} for row in rows]
    arguments = DPOConfig(
        output_dir="runs/bench-trl", per_device_train_batch_size=len(rows), use_cpu=True, bf16=False, report_to="none",
        beta=0.1, max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules=rf".*language_model.*\.({'|'.join(ADAPTED)})")
    trainer = Theirs(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(plain, features=Features(features)),
        processing_class=processor,
        peft_config=adapter,
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


VARIANTS: dict[str, Callable[[int, list[dict[str, Any]]], Step]] = {
    "trl": lambda side, rows: trl(side, rows, head=False),
    "trl_head": lambda side, rows: trl(side, rows, head=True),
    "plain": lambda side, rows: ours(side, rows, layout="plain"),
    "prefix": lambda side, rows: ours(side, rows, layout="shared"),
    "reference kept": lambda side, rows: ours(side, rows, layout="shared", reference="precomputed"),
    "vision kept": lambda side, rows: ours(side, rows, layout="shared", reference="precomputed", keep_features=True),
}


def allowed(side: int, prompt: int, completion: int) -> dict[str, float]:
    """FLOPs of a step by variant, over those of `trl_head`: what a perfect implementation would gain.

    Multiply-adds of the frozen linear layers, attention (causal: half) and head, twice each; the backward pass goes
    through the frozen layers once more for their inputs; embeddings, norms and the LoRA itself are left out.
    """
    body = LAYERS * (WIDTH * (WIDTH // HEADS) * (HEADS + 2 * GROUPS) + WIDTH * WIDTH + 3 * WIDTH * INNER)
    patches = side * side + 1
    tower = 2 * TOWER["num_hidden_layers"] * patches * (
        4 * TOWER["hidden_size"] ** 2 + 2 * TOWER["hidden_size"] * TOWER["intermediate_size"]
    ) + 4 * TOWER["num_hidden_layers"] * TOWER["hidden_size"] * patches**2  # fmt: skip

    def step(tokens: int, seen: float, vision: float, *, reference: bool) -> float:
        linear, attention = 2 * body * tokens, 4 * LAYERS * WIDTH * seen
        head = 2 * WIDTH * VOCABULARY * 2 * completion
        return (2 + reference) * linear + (3 + reference) * attention + (2 + reference) * head + vision

    twice = 2 * (prompt + completion)
    plain = step(twice, (prompt + completion) ** 2, 4 * tower, reference=True)
    seen = prompt**2 / 2 + 2 * completion * (prompt + completion / 2)
    shared = prompt + 2 * completion
    return {
        "plain": plain / step(twice, (prompt + completion) ** 2, 2 * tower, reference=True),
        "prefix": plain / step(shared, seen, tower, reference=True),
        "reference kept": plain / step(shared, seen, tower, reference=False),
        "vision kept": plain / step(shared, seen, 0, reference=False),
    }


def measured(side: int, prompt: int, completion: int, pairs: int, rounds: int) -> dict[str, Any]:
    """Times (seconds), peak memory (MiB), losses, counted FLOPs by variant."""
    rows = rows_of(side, prompt, completion, pairs)
    steps = {name: make(side, rows) for name, make in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: step() for name, step in steps.items()}
    for number in range(rounds):
        order = list(steps)
        random.Random(number).shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    counted = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counted[name] = counter.get_total_flops()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "image_tokens": side * side,
        "prompt": prompt,
        "completion": completion,
        "pairs": pairs,
        "seconds": medians,
        "all_seconds": times,
        "peak_mib": {name: peak(step) for name, step in steps.items()},
        "loss": losses,
        "over_trl_head": {name: medians["trl_head"] / value for name, value in medians.items()},
        "flops_allow": allowed(side, prompt, completion),
        "counted_flops": counted,
    }


def peak(step: Step) -> float:
    """What a step adds to the process's memory at most, MiB (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[128, 576, 1024])
    parser.add_argument("--completions", type=lambda text: [int(n) for n in text.split(",")], default=[32, 128, 256])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    hf.utils.logging.set_verbosity_error()
    cells = []
    for prompt in given.prompts:
        side = int((prompt - 8) ** 0.5)
        for completion in given.completions:
            cell = measured(side, prompt, completion, given.pairs, given.rounds)
            cells.append(cell)
            print(f"prompt {prompt} ({side * side} of the image), completions {completion}: losses "
                  f"{min(cell['loss'].values()):.6f} to {max(cell['loss'].values()):.6f}", flush=True)  # fmt: skip
            for name, seconds in cell["seconds"].items():
                bound = cell["flops_allow"].get(name)
                print(
                    f"  {name:16} {1000 * seconds:7.0f} ms  x{cell['over_trl_head'][name]:.2f}"
                    f"{f' of x{bound:.2f} allowed' if bound else '':22}  +{cell['peak_mib'][name]:.0f} MiB",
                    flush=True,
                )
    if given.out:
        about = {"torch": torch.__version__, "transformers": hf.__version__, "threads": torch.get_num_threads()}
        given.out.write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
