"""Train every family and many settings on an emulated GPU, and compare the logs with those of the CPU.

    python -m tests.bench.emulated_gpu docs/benchmarks/emulated-gpu.json                # all
    python -m tests.bench.emulated_gpu OUT.json sdxl qwen2_5_vl "llava: full"           # these

Each run takes all branches for CUDA, see `tests.emulated_gpu`. Its losses, margins and gradient norms have to have the bits of the run
on the CPU. Results that are in the file are not measured again. It takes 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_image_rows, make_response_rows
from dpo_mm.files.resumable import atomic_write
from dpo_mm.training.run import train
from tests.conftest import noise_image, rows
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS
from tests.emulated_gpu import emulated_gpu

LOGGED = ("loss", "grad_norm", "rewards/margins", "eval_loss")
PAIRS = 8
SETTINGS: dict[str, Any] = {
    "steps": 3, "batch_size": 2, "lora_rank": 4, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, "precision": "fp32",
}  # fmt: skip
ANY_MODEL: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "full": {"tuning": "full"},
    "full, bf16": {"tuning": "full", "precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulate": {"accumulate": 2},
    "DoRA": {"use_dora": True},
    "frozen copy": {"reference": "frozen_copy"},
    "moving average": {"reference": "moving_average"},
    "synced": {"reference": "synced", "reference_sync_steps": 2},
    "evaluation": {"eval_fraction": 0.5, "eval_every": 1, "metric_for_best_model": "eval_loss"},
    "saving": {"save_every": 1},
    "kto": {"objective": "kto"},
    "mixture": {"objective": {"sigmoid": 0.8, "hinge": 0.2}, "sft_weight": 0.1},
    "sdpo": {"objective": "sdpo"},
    "sft": {"objective": "sft"},
    "beta auto": {"beta": "auto"},
    "adafactor": {"optimizer": "adafactor"},
}
IMAGE_MODEL: dict[str, dict[str, Any]] = {
    **ANY_MODEL,
    "precomputed": {"reference": "precomputed", "fixed_draws_per_row": 2},
    "text encoder": {"train_text_encoder": True},
    "draws": {
        "random_flip": True,
        "antithetic_noise": True,
        "stratified_timesteps": True,
        "proportion_empty_prompts": 0.5,
    },
    "logit-normal": {"timestep_sampling": "logit_normal"},
    "cache in bf16": {"cache_precision": "bf16"},
    "samples": {"sample_prompts": "PROMPTS", "sample_steps": 2, "num_inference_steps": 2},
}
RESPONSE_MODEL: dict[str, dict[str, Any]] = {
    **ANY_MODEL,
    "precomputed": {"reference": "precomputed"},
    "separate": {"pair_layout": "separate"},
    "shared prefix": {"pair_layout": "shared_prefix"},
    "shared prefix, bf16": {"pair_layout": "shared_prefix", "precision": "bf16"},
    "cached features": {"cache_vision_features": True},
    "vision tower": {"train_vision_tower": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "edited tokens": {"edited_token_weight": 2.0},
    "corrupted images": {"objective": "image_conditional"},
}
VARIANTS = {"sdxl": IMAGE_MODEL, "qwen2_5_vl": RESPONSE_MODEL}


def cells() -> dict[str, tuple[str, dict[str, Any]]]:
    """Families and settings by the name of the cell."""
    images = [name for name, built in BUILDERS.items() if built.frames == 1]  # clips of published length are too long
    families = {name: (name, dict[str, Any]()) for name in (*images, *tiny_vlms.BUILDERS)}
    return families | {
        f"{family}: {name}": (family, settings)
        for family, variants in VARIANTS.items()
        for name, settings in variants.items()
    }


def _image_pairs(family: str) -> Any:
    """Pairs of a family's size, with an image to edit if it is an editor."""
    built, pairs = BUILDERS[family], rows(PAIRS)
    for n, row in enumerate(pairs):
        for side, name in enumerate(("image_a", "image_b")):
            row[name] = {"bytes": encode_png(noise_image(2 * n + side, built.size)), "path": None}
        if any(word in family for word in ("edit", "kontext", "pix2pix")):
            row["image_source"] = {"bytes": encode_png(noise_image(500 + n, built.size)), "path": None}
    return make_image_rows(pairs)


def _files(family: str, work: Path) -> tuple[str, str, dict[str, Any]]:
    """Folder of the model, file of the pairs, and settings for them."""
    folder, pairs = work / "model", work / "pairs.parquet"
    if family in BUILDERS:
        folder = BUILDERS[family].build(folder)
        _image_pairs(family).to_parquet(pairs)
        return str(folder), str(pairs), {"beta": 100.0, "resolution": BUILDERS[family].size}
    tiny_vlms.save(family, folder)
    images = int(family in tiny_vlms.IMAGES)
    make_response_rows(tiny_vlms.rows(family, (images,) * PAIRS)).to_parquet(pairs)
    return str(folder), str(pairs), {"beta": 0.1}


def log_of(config: TrainConfig) -> list[dict[str, float]]:
    """Train, and return what was logged in each step."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config)
    history = json.loads((Path(config.output_dir) / "training_log.json").read_text())["history"]
    picked = [{name: entry[name] for name in LOGGED if name in entry} for entry in history]
    return [entry for entry in picked if entry]


def compare(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train on the CPU and on the emulated GPU. An error on the CPU is raised, one on the GPU only is a result."""
    with tempfile.TemporaryDirectory() as work:
        model, pairs, own = _files(family, Path(work))
        (Path(work) / "prompts.txt").write_text("a red square\na blue circle\n")
        if settings.get("sample_prompts"):
            settings = {**settings, "sample_prompts": f"{work}/prompts.txt"}
        options = {**own, **SETTINGS, **settings}
        if options.get("tuning") == "full":
            del options["lora_rank"]
        expected = log_of(TrainConfig(model, pairs, f"{work}/cpu", **options))
        try:
            with emulated_gpu():
                logged = log_of(TrainConfig(model, pairs, f"{work}/gpu", **options))
        except Exception as error:
            place = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dpo_mm/" in frame.filename][-1]
            return {
                "error": f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"[:500]
            }
    if logged == expected:
        return {"equal": True, "logged": len(logged)}
    pairs_of_entries = list(zip(expected, logged, strict=True))
    differences = {
        name: max(abs(entry[name] - other[name]) for entry, other in pairs_of_entries if name in entry)
        for name in LOGGED
        if any(name in entry for entry in expected)
    }
    return {"equal": False, "largest_differences": differences, "cpu": expected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of the results")
    parser.add_argument("names", nargs="*", help="families, or 'family: settings'. Default: all")
    options = parser.parse_args()
    known = json.loads(options.out.read_text())["cells"] if options.out.exists() else {}
    for name, (family, settings) in cells().items():
        if name in known or (options.names and name not in options.names):
            continue
        known[name] = compare(family, settings)
        print(f"{name}: {known[name]}", flush=True)
        with atomic_write(options.out) as temporary:
            about = {"command": "python -m tests.bench.emulated_gpu", "torch": torch.__version__}
            temporary.write_text(json.dumps({**about, "cells": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
