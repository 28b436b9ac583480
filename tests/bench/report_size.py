"""Write the report of a comparison with many prompts, without a model, and print its size and the time as JSON.

    python -m tests.bench.report_size images 5000 WORK_FOLDER
    python -m tests.bench.report_size responses 5000 WORK_FOLDER

Images are files of 512 pixels with random scores. Responses are texts with or without a mistake. Everything after generation
and scoring runs as in `dpo-mm compare`: statistics, tests, charts, examples and files.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from dpo_mm.config import CompareConfig, CompareResponsesConfig
from dpo_mm.data.schema import Response
from dpo_mm.evaluation import compare_images, compare_responses
from dpo_mm.evaluation.image_sampling import SamplingPlan, ScoredImages
from dpo_mm.evaluation.image_store import ImageFiles
from dpo_mm.evaluation.response_sampling import score_responses
from tests.bench.rows_at_scale import PeakMemory

CATEGORIES = 12
FILES = 200
"""Distinct image files, used in turn."""


class RandomSampler:
    """Sampler whose images are files on disk and whose scores are random."""

    policy = None

    def __init__(self, files: list[Path], config: CompareConfig) -> None:
        self.files, self.config = files, config

    def generate(
        self, plan: SamplingPlan, *, scale: float, label: str, judges: Sequence[str] | None = None
    ) -> ScoredImages:
        """Return one file and one score per image of the plan."""
        rng, count = np.random.default_rng(int(scale)), len(plan.prompts)
        files = ImageFiles([self.files[n] for n in rng.integers(0, FILES, count)])
        return ScoredImages(plan, files, {judge: rng.normal(scale / 10, 1, count) for judge in self.config.judges})

    def settings(self, scale: float) -> dict[str, Any]:
        """Return settings for the report."""
        return {"scheduler": "none", "dtype": "float32", "libraries": "none"}


def write_images(folder: Path) -> list[Path]:
    """Write smooth noise with some grain as PNG files of 512 pixels, about 450 kB each."""
    rng, files = np.random.default_rng(0), []
    for number in range(FILES):
        small = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((512, 512), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (pixels + rng.integers(-4, 5, pixels.shape)).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def compare_random_images(prompts: int, folder: Path) -> None:
    """Compare two models whose images and scores are random, two images per prompt."""
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "category"], *([f"a prompt, number {n}", f"kind {n % CATEGORIES}"] for n in range(prompts))]
        )
    config = CompareConfig(
        model="model",
        adapter="adapter",
        prompts=str(folder / "prompts.csv"),
        output_dir=str(folder / "out"),
        judges=("aesthetic",),
        images_per_prompt=2,
    )
    files = write_images(folder)
    module: Any = compare_images
    module._load = lambda *_: None
    module.ImageSampler = lambda *_: RandomSampler(files, config)
    module.truncated_prompts = lambda *_: ""
    module.check_prompt_sources = lambda *_: None
    module.training_judges_of_adapter = lambda *_: ()
    compare_images.compare_images(config, title="Report of a large comparison", command="none")


def compare_random_responses(questions: int, folder: Path) -> None:
    """Compare two models whose responses have mistakes at random, with a photo per question."""
    names = [path.name for path in write_images(folder)]
    with (folder / "questions.jsonl").open("w") as file:
        for n in range(questions):
            row = {"prompt": f"Question {n}?", "image": names[n % FILES], "ground_truth": f"a red circle {n}."}
            file.write(json.dumps({**row, "category": f"kind {n % CATEGORIES}"}) + "\n")
    config = CompareResponsesConfig("model", str(folder / "out"), str(folder / "questions.jsonl"), judges=("cer",))
    module: Any = compare_responses

    def generate(policy: Any, asked: Any, config: Any, *, base: bool, **_: Any) -> Any:
        wrong = np.random.default_rng(base).random(len(asked)) < (0.4 if base else 0.3)
        texts = [question.ground_truth + " and a star" * bool(bad) for question, bad in zip(asked, wrong, strict=True)]
        return score_responses([Response(text, len(text) // 4, hit_limit=False) for text in texts], asked, config)

    module._load, module.generate_responses = lambda *_: SimpleNamespace(), generate
    compare_responses.compare_responses(config, title="Report of a large comparison", command="none")


def main() -> None:
    kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    (folder / "out").mkdir(parents=True, exist_ok=True)
    peak = PeakMemory()
    peak.start()
    start, cpu = time.perf_counter(), time.process_time()
    (compare_random_images if kind == "images" else compare_random_responses)(count, folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    image_bytes = sum(len(part.partition('"')[0]) for part in page.split("data:image/")[1:])
    measured = {
        "report_mib": round((folder / "out/report.html").stat().st_size / 2**20, 2),
        "inlined_images": page.count("data:image/"),
        "inlined_images_mib": round(image_bytes / 2**20, 2),
        "metrics_json_mib": round((folder / "out/metrics.json").stat().st_size / 2**20, 2),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mib": round(peak.mib),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
