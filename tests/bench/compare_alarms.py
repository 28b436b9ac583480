"""How often `compare_images` is wrong where the truth is known: the base against itself, and against a damaged model.

    python -m tests.bench.compare_alarms            # about a quarter of an hour on one CPU core

Three cases on the shipped shapes pipeline, at small limits: the base against itself by `compare_images` (the same pictures, so
nothing may be found), the base against itself from other seeds (nothing changed, but every picture did: the false alarms
of the whole verdict, over pairs that share no picture, with the exact interval of their rate), and the base against itself
with noise on the weights of its UNet ("worse" must be found). Pictures are kept, so a run goes on where it was cut.
Writes docs/benchmarks/compare-alarms.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import CompareConfig
from dpo_mm.evaluation.compare_images import compare_images, comparisons, verdict
from dpo_mm.evaluation.image_sampling import ImageSampler, sampling_plan
from dpo_mm.evaluation.image_store import FOLDER, ImageStore
from dpo_mm.evaluation.statistics import Comparison, rate_interval
from dpo_mm.policies.families import load_image_policy

TARGET = Path(__file__).parents[2] / "docs" / "benchmarks" / "compare-alarms.json"
CONFIG = CompareConfig(
    model="shapes-sd",
    output_dir="",
    max_prompts=24,
    images_per_prompt=2,
    judges=("faithfulness", "aesthetic"),
    num_inference_steps=6,
    guidance_scale=1.5,
    batch_size=48,
)
APART = 10_000
"""The first seed of the draws that share no picture."""


def damaged(folder: Path, strength: float) -> str:
    """The base's UNet with noise of this share of each weight's own spread, saved as a tuned one."""
    policy = load_image_policy(CONFIG.model, precision=CONFIG.precision)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += strength * weight.std(correction=0) * torch.randn(weight.shape, generator=noise)
    policy.model.save_pretrained(folder / "unet")
    return str(folder)


def against_itself(config: CompareConfig) -> str:
    return compare_images(config, title="The base against itself", command="").verdict


def against_other_seeds(studio: ImageSampler, pair: int) -> tuple[str, Comparison]:
    """The whole verdict on two sets of the base's pictures as if one were a tuned model's, and its headline."""
    one, other = (
        studio.generate(
            sampling_plan(dataclasses.replace(studio.config, seed=APART + 2 * pair + side)), scale=0.0, label="base"
        )
        for side in (0, 1)
    )
    assert not set(one.plan.seeds) & set(other.plan.seeds)
    found = comparisons(one, dataclasses.replace(other, plan=one.plan), studio.config)
    return verdict(found), found[0]


def alarms(found: list[tuple[str, Comparison]]) -> dict[str, Any]:
    """How often something was found where nothing is, in all and for the first twenty, and each headline."""
    wrong = sum(word != "no evidence" for word, _ in found)
    return {
        "verdicts": Counter(word for word, _ in found),
        "first twenty": Counter(word for word, _ in found[:20]),
        "false alarms": wrong / len(found),
        "95 % interval": rate_interval(wrong, len(found)),
        "pairs": [
            {"verdict": word, **{key: round(getattr(one, key), 4) for key in ("difference", "low", "high", "p")}}
            for word, one in found
        ],
    }


def against_damaged(config: CompareConfig, folder: str) -> dict[str, Any]:
    outcome = compare_images(
        dataclasses.replace(config, adapter=folder), title="The base against a damaged one", command=""
    )
    return {"verdict": outcome.verdict, **outcome.comparisons[0].as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=100, help="of draws of the base from other seeds")
    parser.add_argument("--strength", type=float, default=0.3, help="noise, as a share of each weight's spread")
    parser.add_argument("--work", type=Path, default=Path("runs/compare-alarms"))
    given = parser.parse_args()
    started = time.process_time()
    config = dataclasses.replace(CONFIG, output_dir=str(given.work))
    with suppress_library_output():
        each = [dataclasses.replace(config, seed=seed) for seed in range(given.seeds)]
        itself = Counter(against_itself(one) for one in each)
        studio = ImageSampler(
            load_image_policy(config.model, precision=config.precision), config, ImageStore(given.work / FOLDER)
        )
        seeds = alarms([against_other_seeds(studio, pair) for pair in range(given.pairs)])
        folder = damaged(given.work / "damaged", given.strength)
        worse = [against_damaged(one, folder) for one in each[:3]]
    found = {
        "command": f"python -m tests.bench.compare_alarms --seeds {given.seeds} --pairs {given.pairs} --strength {given.strength:g}",
        "settings": {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "output_dir"},
        "base against itself": itself,
        "base against itself from other seeds": seeds,
        "base against a damaged one": worse,
        "cpu_seconds": round(time.process_time() - started),
    }
    TARGET.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
