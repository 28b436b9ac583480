"""Compute hours and bytes of jobs of real size on 1, 8 and 64 GPUs, on paper.

    python -m tests.bench.scaling --out docs/benchmarks/scaling.json --page docs/how-to/several-gpus.md

Nothing is run on a GPU here. `MEASURED` has the step times of one H100. FLOPs, gradients and encoded rows are counted on the meta
device. Rates of links, disks and processors are assumptions, in `ASSUMED`. A job without a measured step takes its counted FLOPs at
the rate that the measured step of a model of its kind reached. A step takes its computation and then its communication, without
overlap. The bottleneck is the largest of computation, loader, interconnect and disk.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_mm.training.memory_estimate import _row, _step, disk_bytes
from dpo_mm.training.meta_execution import CudaRules, MixedMetaMode
from tests.bench.pages import counting_options, write_tables
from tests.bench.published_models import MODELS, config_of, response_row
from tests.bench.what_fits import ADAPTED

GPUS = (1, 8, 64)
PER_NODE = 8
ASSUMED = {
    "NVLink, GB/s per GPU": 300.0,
    "network, GB/s per GPU": 50.0,
    "disk, GB/s per node": 2.0,
    "processes that load rows, per GPU": 4,
    "CPU seconds per vision-language row": 0.11,
    "CPU seconds per encoded image pair": 0.01,
    "MB per image file": 0.3,
}
"""Rates that are neither counted nor measured here. 0.11 s is the middle of 80 to 140 ms, measured on a CPU for 972 image tokens."""


class Measured(NamedTuple):
    """A measured step on one H100: milliseconds, pairs, and its settings."""

    ms: float
    pairs: int
    settings: dict[str, Any]
    row: dict[str, int] | None = None


MEASURED = {
    "SDXL": Measured(1190, 4, {"batch_size": 4, "gradient_checkpointing": True}),
    "FLUX.1-dev": Measured(2112, 1, {"batch_size": 1, "gradient_checkpointing": True}),
    "Qwen2.5-VL-3B": Measured(
        693, 2, {"batch_size": 2, "gradient_checkpointing": True, "lora_targets": ADAPTED},
        {"image_tokens": 576, "prompt_words": 16, "response_words": 128},
    ),
}  # fmt: skip
LONG = {"image_tokens": 1024, "prompt_words": 64, "response_words": 256}


class Job(NamedTuple):
    """Rows of one epoch, a model, its settings, and the measured model whose rate it takes."""

    rows: int
    model: str
    settings: dict[str, Any]
    like: str
    row: dict[str, int] | None = None


JOBS = {
    "100,000 pairs, SDXL, LoRA": Job(100_000, "SDXL", MEASURED["SDXL"].settings, "SDXL"),
    "100,000 pairs, FLUX.1-dev, LoRA": Job(100_000, "FLUX.1-dev", MEASURED["FLUX.1-dev"].settings, "FLUX.1-dev"),
    "RLHF-V, Qwen2.5-VL-7B, LoRA": Job(
        5_733, "Qwen2.5-VL-7B", {"batch_size": 1, "gradient_checkpointing": True}, "Qwen2.5-VL-3B", LONG
    ),
    "RLAIF-V, Qwen2.5-VL-7B, LoRA": Job(
        83_000, "Qwen2.5-VL-7B", {"batch_size": 1, "gradient_checkpointing": True}, "Qwen2.5-VL-3B", LONG
    ),
    "RLAIF-V, Qwen2.5-VL-7B, full, FSDP2": Job(
        83_000, "Qwen2.5-VL-7B", {"batch_size": 1, "gradient_checkpointing": True, "tuning": "full"}, "Qwen2.5-VL-3B", LONG
    ),
}  # fmt: skip


class StepCounts(NamedTuple):
    """Counted on the meta device: FLOPs per step (10^12), trained and all parameters (10^9), encoded bytes per pair on disk."""

    tflop: float
    trained: float
    parameters: float
    disk: int


def count_step(name: str, settings: dict[str, Any], row: dict[str, int] | None) -> StepCounts:
    """Count a training step with its reference, and what is stored."""
    config = config_of(name, **settings)
    policy = MODELS[name].build("bf16" if config.tuning == "lora" else "fp32")
    disk, encoded = 0, None
    if MODELS[name].modality == "text":
        encoded = response_row(policy, **(row or {}))
        policy.prepare(config)
    else:
        disk = sum(disk_bytes(policy, config))
        policy.prepare(config)
    with MixedMetaMode(), torch.random.fork_rng(devices=[]), CudaRules() as rules:
        rows = [encoded or _row(policy)] * config.batch_size
        batch = policy.collate(rows)
        with FlopCounterMode(display=False) as counter:
            _step(policy, config, batch, rules)
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    trained = sum(number for number, requires_grad in sizes if requires_grad)
    return StepCounts(counter.get_total_flops() / 1e12, trained / 1e9, sum(n for n, _ in sizes) / 1e9, disk)


def link_seconds(gigabytes: float, gpus: int) -> float:
    """Seconds to move this much per GPU: over NVLink within a node, over the network between nodes."""
    if gpus == 1:
        return 0.0
    return gigabytes / ASSUMED[f"{'NVLink' if gpus <= PER_NODE else 'network'}, GB/s per GPU"]


def plan(job: Job, counts: StepCounts, rates: dict[str, float], gpus: int) -> dict[str, Any]:
    """Hours per epoch and bytes of a job on a number of GPUs."""
    pairs = job.settings["batch_size"]
    measured = MEASURED.get(job.model)
    is_measured = measured is not None and measured.settings == job.settings
    compute = measured.ms / 1000 if is_measured and measured else counts.tflop / rates[job.like]
    if job.settings.get("tuning") == "full":  # weights of policy and reference twice and once, gradients once
        moved = (3 * 4 * counts.parameters + 4 * counts.trained) * (gpus - 1) / gpus
    else:  # an all-reduce of the adapter's gradients
        moved = 2 * 4 * counts.trained * (gpus - 1) / gpus
    is_text = MODELS[job.model].modality == "text"
    cpu = ASSUMED[f"CPU seconds per {'vision-language row' if is_text else 'encoded image pair'}"]
    stored = 1e6 * ASSUMED["MB per image file"] if is_text else counts.disk
    seconds = {
        "computation": compute,
        "loader": pairs * cpu / ASSUMED["processes that load rows, per GPU"],
        "interconnect": link_seconds(moved, gpus),
        "disk": pairs * stored * min(gpus, PER_NODE) / (1e9 * ASSUMED["disk, GB/s per node"]),
    }
    step = max(seconds["computation"] + seconds["interconnect"], seconds["loader"], seconds["disk"])
    steps = -(-job.rows // (pairs * gpus))
    return {
        "gpus": gpus, "steps": steps, "rows per second": pairs * gpus / step, "hours per epoch": steps * step / 3600,
        "seconds per step": seconds, "bottleneck": max(seconds, key=lambda part: seconds[part]),
        "step time": "measured" if is_measured else "counted FLOPs at a measured rate",
        "moved per GPU and step, MB": 1000 * moved, "on disk, GB": job.rows * stored / 1e9,
        "read per second and node, MB": pairs * min(gpus, PER_NODE) * stored / step / 1e6,
    }  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """Format the results as a table in Markdown."""
    lines = [
        "| job, one epoch | step time | on disk, GB | hours on 1 / 8 / 64 GPUs | rows per second | moved per GPU and step, MB | "
        "bottleneck |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, plans in results["jobs"].items():
        each = lambda key, form, plans=plans: " / ".join(form.format(p[key]) for p in plans)
        bottlenecks = list(dict.fromkeys(p["bottleneck"] for p in plans))
        lines.append(
            f"| {name} | {plans[0]['step time']} | {plans[0]['on disk, GB']:.1f} | {each('hours per epoch', '{:.1f}')} | "
            f"{each('rows per second', '{:.1f}')} | {each('moved per GPU and step, MB', '{:,.0f}')} | {', then '.join(bottlenecks)} |"
        )
    lines += [
        "",
        "| measured step on an H100 | ms | pairs | counted TFLOP per step | TFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for name, step in results["measured"].items():
        lines.append(
            f"| {name} | {step['ms']:,.0f} | {step['pairs']} | {step['tflop']:.0f} | {step['tflop per second']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = counting_options(__doc__)
    counted: dict[str, StepCounts] = {}

    def counts(name: str, settings: dict[str, Any], row: dict[str, int] | None) -> StepCounts:
        key = json.dumps([name, settings, row])
        if key not in counted:
            counted[key] = count_step(name, settings, row)
            print(key, counted[key], flush=True)
        return counted[key]

    steps = {name: counts(name, step.settings, step.row) for name, step in MEASURED.items()}
    rates = {name: steps[name].tflop / step.ms * 1000 for name, step in MEASURED.items()}
    measured = {
        name: {"ms": step.ms, "pairs": step.pairs, "tflop": steps[name].tflop, "tflop per second": rates[name]}
        for name, step in MEASURED.items()
    }
    jobs = {
        name: [plan(job, counts(job.model, job.settings, job.row), rates, gpus) for gpus in GPUS]
        for name, job in JOBS.items()
    }
    results = {"torch": torch.__version__, "assumed": ASSUMED, "measured": measured, "jobs": jobs}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.page:
        write_tables(options.page, "scaling", page(results))


if __name__ == "__main__":
    main()
