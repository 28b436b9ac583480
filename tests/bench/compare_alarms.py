"""How often `compare` is wrong where the truth is known: the base against itself, and against a damaged model.

    python -m tests.bench.compare_alarms            # about three minutes on one CPU core

Three cases on the shipped shapes pipeline, at small limits: the base against itself by `compare` (the same pictures, so
nothing may be found), the base against itself from other seeds (nothing changed, but every picture did: the false alarms
of the whole verdict), and the base against itself with noise on the weights of its UNet ("worse" must be found).
Pictures are kept in one gallery, so a base picture is drawn once for all three. Writes docs/benchmarks/compare-alarms.json.
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

from dpo_mm.cli import quietly
from dpo_mm.config import CompareConfig
from dpo_mm.evaluation.compare import compare, comparisons, drifted, opened, verdict
from dpo_mm.evaluation.drawing import Studio, plan_of
from dpo_mm.evaluation.gallery import FOLDER, Gallery

TARGET = Path(__file__).parents[2] / "docs" / "benchmarks" / "compare-alarms.json"
CONFIG = CompareConfig(
    model="shapes-sd",
    output_dir="",
    limit=24,
    samples=2,
    judges=("faithfulness", "aesthetic"),
    sampling_steps=6,
    guidance=1.5,
    batch_size=48,
)


def damaged(folder: Path, strength: float) -> str:
    """The base's UNet with noise of this share of each weight's own spread, saved as a tuned one."""
    policy = opened(CONFIG, None)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += strength * weight.std(correction=0) * torch.randn(weight.shape, generator=noise)
    policy.model.save_pretrained(folder / "unet")
    return str(folder)


def against_itself(config: CompareConfig) -> str:
    return compare(config, title="The base against itself", command="").verdict


def against_other_seeds(config: CompareConfig) -> str:
    """The whole verdict on two sets of the base's pictures, judged as if one were a tuned model's.

    Neighbours share a seed's pictures, which saves drawing: one odd draw counts twice, once for better and once for worse.
    """
    studio = Studio(opened(config, None), config, Gallery(Path(config.output_dir) / FOLDER))
    one, other = (
        studio.draw(plan_of(dataclasses.replace(config, seed=seed)), scale=0.0, label="base")
        for seed in (config.seed, config.seed + 1)
    )
    both = dataclasses.replace(other, plan=one.plan)
    return verdict(comparisons(one, both, config) + drifted(one, both, seed=config.seed))


def against_damaged(config: CompareConfig, folder: str) -> dict[str, Any]:
    outcome = compare(dataclasses.replace(config, adapter=folder), title="The base against a damaged one", command="")
    return {"verdict": outcome.verdict, **outcome.comparisons[0].as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strength", type=float, default=0.3, help="noise, as a share of each weight's spread")
    parser.add_argument("--work", type=Path, default=Path("runs/compare-alarms"))
    given = parser.parse_args()
    started = time.process_time()
    config = dataclasses.replace(CONFIG, output_dir=str(given.work))
    with quietly():
        each = [dataclasses.replace(config, seed=seed) for seed in range(given.seeds)]
        itself = Counter(against_itself(one) for one in each)
        seeds = Counter(against_other_seeds(one) for one in each)
        folder = damaged(given.work / "damaged", given.strength)
        worse = [against_damaged(one, folder) for one in each[:3]]
    found = {
        "command": f"python -m tests.bench.compare_alarms --seeds {given.seeds} --strength {given.strength:g}",
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
