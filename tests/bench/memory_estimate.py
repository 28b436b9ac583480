"""Compare the memory estimate of `--dry-run` with the measured peak of a training step on this machine.

    python -m tests.bench.memory_estimate --out docs/benchmarks/memory-estimate.json
    python -m tests.bench.memory_estimate --device cuda --cells sdxl --out ...         # real size, the GPU's allocator

Each cell runs in a separate process, on a model of diffusers' classes with random weights, with LoRA or full fine-tuning.
The first step creates the optimizer's state. The measurement is the peak memory that a second step adds to the process:
VmHWM, with large allocations mapped so that freed ones are returned to the system, or max_memory_allocated on a GPU.
On a CPU the cells are in float32, because the estimate follows the autocast of a GPU.
Estimates for SD1.5 and SDXL at their real size need no weights and are printed at the end. On a machine with a GPU,
`--cells` measures them too.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.diffusion_policy import DTYPES
from dpo_mm.policies.diffusion.sd3 import StableDiffusion3
from dpo_mm.training.half_precision import autocast
from dpo_mm.training.memory_estimate import count_images
from dpo_mm.training.reference import build_reference
from tests.bench.diffusion_step import SIZES, build, status
from tests.contracts.families.words import clip_tokenizer


class Cell(NamedTuple):
    """A model of tests.bench.diffusion_step.SIZES, or "transformer" (see policy_of), and settings of TrainConfig."""

    model: str
    settings: dict[str, Any]


CELLS = {
    "UNet, LoRA": Cell("small", {"batch_size": 2}),
    "UNet, LoRA, checkpointing": Cell("small", {"batch_size": 2, "gradient_checkpointing": True}),
    "UNet, whole": Cell("small", {"batch_size": 1, "tuning": "full"}),
    "transformer, LoRA": Cell("transformer", {"batch_size": 2}),
    "transformer, LoRA, checkpointing": Cell("transformer", {"batch_size": 2, "gradient_checkpointing": True}),
    "transformer, whole": Cell("transformer", {"batch_size": 1, "tuning": "full"}),
}
REAL = {
    "sd15": Cell("sd15", {"batch_size": 4, "precision": "bf16"}),
    "sd15, checkpointing": Cell("sd15", {"batch_size": 4, "precision": "bf16", "gradient_checkpointing": True}),
    "sdxl": Cell("sdxl", {"batch_size": 1, "precision": "bf16"}),
    "sdxl, checkpointing": Cell("sdxl", {"batch_size": 1, "precision": "bf16", "gradient_checkpointing": True}),
}


def policy_of(model: str, *, device: str, precision: str) -> Any:
    """A policy with random weights. The transformer has SD3's shape with width 512 and 10 layers, at 512 px."""
    if model != "transformer":
        return build(SIZES[model], device=device, precision=precision)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        words = clip_tokenizer(Path(folder))
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(**shape, **ids, vocab_size=len(words), projection_dim=64, max_position_embeddings=77)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device(device):
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=64, in_channels=16, out_channels=16, num_layers=10, attention_head_dim=64, num_attention_heads=8,
            joint_attention_dim=512, caption_projection_dim=512, pooled_projection_dim=128,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            latent_channels=16, block_out_channels=(16, 32, 32, 32), norm_num_groups=16, sample_size=512, **kinds
        )
        texts = [CLIPTextModelWithProjection(config) for _ in range(2)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = [part.to(DTYPES[precision]) for part in (transformer, vae, *texts)]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=parts[0], vae=parts[1], text_encoder=parts[2], text_encoder_2=parts[3], tokenizer=words,
        tokenizer_2=words, text_encoder_3=None, tokenizer_3=None, scheduler=scheduler,
    )  # fmt: skip
    return StableDiffusion3(pipe, "bench")


def config_of(cell: Cell) -> TrainConfig:
    return TrainConfig("bench", "bench", "bench", **cell.settings)


def estimate_memory(cell: Cell) -> dict[str, Any]:
    """The estimate in MiB, and the CPU seconds that it took."""
    config = config_of(cell)
    start = time.process_time()
    precision = config.precision if config.tuning == "lora" else "fp32"
    policy = policy_of(cell.model, device="meta", precision=precision)
    policy.prepare(config)
    memory = count_images(policy, config).memory(config)
    parts = {name: value / 2**20 for name, value in dataclasses.asdict(memory).items()}
    return {**parts, "training": memory.training / 2**20, "seconds": time.process_time() - start}


def measure_peak(cell: Cell, device: str) -> float:
    """The peak memory of a step in MiB, without weights and optimizer state."""
    config = config_of(cell)
    policy = policy_of(cell.model, device=device, precision=config.precision if config.tuning == "lora" else "fp32")
    image = torch.zeros(3, policy.resolution, policy.resolution)
    with torch.no_grad():
        posterior = policy.vae.encode(image[None].to(device, policy.vae.dtype)).latent_dist
    mean = posterior.mean[0].float().cpu()
    prompt = {name: value[0] for name, value in policy.encode_prompts(["a picture"]).items()}
    columns = {f"{side}_{part}": mean for side in ("chosen", "rejected") for part in ("mean", "std")}
    policy.free_encoders()
    policy.prepare(config)
    reference = build_reference(policy, config)
    policy.model.train()
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], foreach=False)

    def step() -> None:
        batch = policy.collate(
            [{"id": str(n), "visit": 0, "prompt": prompt, **columns} for n in range(config.batch_size)]
        )
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        batch["prompt"] = {k: v.to(device) for k, v in batch["prompt"].items()}
        with autocast(config, device):
            reference_log_probs = reference(policy.model, batch)
            log_probs = policy.log_probs(policy.model, batch)
        (
            log_probs.chosen - reference_log_probs.chosen - log_probs.rejected + reference_log_probs.rejected
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - resident) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = status("VmRSS")
    step()
    return status("VmHWM") - resident


def measure_in_new_process(name: str, device: str) -> float:
    """Run `measure_peak` in a new process."""
    command = [sys.executable, "-m", "tests.bench.memory_estimate", "--device", device, "--one", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cells = {**CELLS, **REAL}
    torch.set_num_threads(1) if options.device == "cpu" else None
    if options.one:
        print(measure_peak(cells[options.one], options.device))
        return
    rows = {}
    for name in options.cells:
        estimate, peak = estimate_memory(cells[name]), measure_in_new_process(name, options.device)
        ratio = estimate["step"] / peak
        rows[name] = {"model": cells[name].model, **cells[name].settings, "estimate_mib": estimate,
                      "measured_step_mib": peak, "ratio": ratio}  # fmt: skip
        print(
            f"{name:34} step estimated {estimate['step']:8.1f} MiB, measured {peak:8.1f}, ratio {ratio:.3f}", flush=True
        )
    real_size = {name: estimate_memory(cell) for name, cell in REAL.items()}
    for name, estimate in real_size.items():
        print(f"{name:34} {estimate['training'] / 1024:.2f} GiB to train, {estimate['encoding'] / 1024:.2f} to encode, "
              f"counted in {estimate['seconds']:.0f} s", flush=True)  # fmt: skip
    if options.out:
        about = {
            "command": "python -m tests.bench.memory_estimate",
            "device": options.device,
            "torch": torch.__version__,
        }
        options.out.write_text(json.dumps({**about, "cells": rows, "real_size_estimates": real_size}, indent=1) + "\n")


if __name__ == "__main__":
    main()
