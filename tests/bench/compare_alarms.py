"""Measure how often the verdict of `compare_images` is wrong, in cases where the right verdict is known.

    python -m tests.bench.compare_alarms            # about a quarter of an hour on one CPU core

Three cases on the bundled shapes pipeline, with few prompts:

- The base against itself by `compare_images`. The images are identical, so the verdict must be "no evidence".
- The base against itself with other seeds. The model is the same but every image differs, so each other verdict is a
  false alarm. The pairs share no image, and the rate of false alarms has an exact confidence interval.
- The base against itself with noise on the weights of its UNet. The verdict must be "worse".

Images are cached, so an interrupted run resumes. Writes docs/benchmarks/compare-alarms.json.
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
from dpo_mm.evaluation.significance import rate_interval
from dpo_mm.evaluation.statistics import Comparison
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
FIRST_SEED = 10_000
"""The first seed of the images that no other comparison uses."""


def save_damaged_model(folder: Path, strength: float) -> str:
    """Save the base's UNet with noise on its weights, as a tuned model, and return the folder.

    strength: standard deviation of the noise, as a fraction of each tensor's standard deviation.
    """
    policy = load_image_policy(CONFIG.model, precision=CONFIG.precision)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += strength * weight.std(correction=0) * torch.randn(weight.shape, generator=noise)
    policy.model.save_pretrained(folder / "unet")
    return str(folder)


def compare_with_itself(config: CompareConfig) -> str:
    return compare_images(config, title="The base against itself", command="").verdict


def compare_with_other_seeds(sampler: ImageSampler, pair: int) -> tuple[str, Comparison]:
    """Compare two sets of the base's images as if one were a tuned model's. Returns the verdict and the primary metric."""
    base, other_seeds = (
        sampler.generate(
            sampling_plan(dataclasses.replace(sampler.config, seed=FIRST_SEED + 2 * pair + side)),
            scale=0.0,
            label="base",
        )
        for side in (0, 1)
    )
    assert not set(base.plan.seeds) & set(other_seeds.plan.seeds)
    results = comparisons(base, dataclasses.replace(other_seeds, plan=base.plan), sampler.config)
    return verdict(results), results[0]


def count_alarms(results: list[tuple[str, Comparison]]) -> dict[str, Any]:
    """The rate of false alarms, the verdicts of all and of the first twenty pairs, and each primary metric."""
    wrong = sum(word != "no evidence" for word, _ in results)
    return {
        "verdicts": Counter(word for word, _ in results),
        "first twenty": Counter(word for word, _ in results[:20]),
        "false alarms": wrong / len(results),
        "95 % interval": rate_interval(wrong, len(results)),
        "pairs": [
            {
                "verdict": word,
                **{
                    key: None if (value := getattr(comparison, key)) is None else round(value, 4)
                    for key in ("difference", "low", "high", "p")
                },
            }
            for word, comparison in results
        ],
    }


def compare_with_damaged(config: CompareConfig, folder: str) -> dict[str, Any]:
    outcome = compare_images(
        dataclasses.replace(config, adapter=folder), title="The base against a damaged one", command=""
    )
    return {"verdict": outcome.verdict, **outcome.comparisons[0].as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--pairs", type=int, default=100, help="number of comparisons of the base with itself on other seeds"
    )
    parser.add_argument(
        "--strength", type=float, default=0.3, help="noise, as a fraction of each tensor's standard deviation"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/compare-alarms"))
    options = parser.parse_args()
    start = time.process_time()
    config = dataclasses.replace(CONFIG, output_dir=str(options.work))
    with suppress_library_output():
        configs = [dataclasses.replace(config, seed=seed) for seed in range(options.seeds)]
        same_images = Counter(compare_with_itself(config_of_seed) for config_of_seed in configs)
        sampler = ImageSampler(
            load_image_policy(config.model, precision=config.precision), config, ImageStore(options.work / FOLDER)
        )
        other_seeds = count_alarms([compare_with_other_seeds(sampler, pair) for pair in range(options.pairs)])
        folder = save_damaged_model(options.work / "damaged", options.strength)
        worse = [compare_with_damaged(config_of_seed, folder) for config_of_seed in configs[:3]]
    report = {
        "command": f"python -m tests.bench.compare_alarms --seeds {options.seeds} --pairs {options.pairs} --strength {options.strength:g}",
        "settings": {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "output_dir"},
        "base against itself": same_images,
        "base against itself from other seeds": other_seeds,
        "base against a damaged one": worse,
        "cpu_seconds": round(time.process_time() - start),
    }
    TARGET.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
