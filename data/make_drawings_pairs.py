"""Make the prompt lists in data/drawings, and mine preference pairs from the bundled base model.

    python data/make_drawings_pairs.py                      # the prompt lists, seconds
    python data/make_drawings_pairs.py --mine runs/mined    # also pairs, about 30 minutes on one CPU core

`data/drawings/faithfulness.parquet` was mined with these settings from 780 other training prompts (data/drawings/README.md), so
a new run gives other pairs. It is not overwritten.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import MineConfig
from dpo_mm.mining.mine_images import mine_images
from dpo_mm.worlds import drawing_prompts

FOLDER = Path(__file__).parent / "drawings"
COUNTS = {"train": 1_200, "held-out": 300}


def write_prompts(path: Path, count: int, *, held_out: bool) -> None:
    """Write a list of prompts with their categories."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt", "category"])
        for prompt in drawing_prompts.sample_prompts(count, seed=0, held_out=held_out):
            writer.writerow([prompt, drawing_prompts.parse(prompt).category])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mine", type=Path, help="folder for newly mined pairs")
    options = parser.parse_args()
    for name, count in COUNTS.items():
        write_prompts(FOLDER / f"prompts-{name}.csv", count, held_out=name == "held-out")
    if options.mine:
        with suppress_library_output():
            mine_images(
                MineConfig(
                    "drawings-sd",
                    "drawings-train",
                    str(options.mine),
                    "drawings_agreement",
                    max_prompts=780,
                    images_per_prompt=6,
                    num_inference_steps=10,
                    guidance_scale=3.0,
                    batch_size=48,
                )
            )


if __name__ == "__main__":
    main()
