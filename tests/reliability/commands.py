"""Every command that writes files, on tiny models and datasets, for tests that interrupt it or damage its files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpo_mm.data.schema import make_image_rows, make_response_rows
from dpo_mm.labels.store import VoteStore
from tests.conftest import noise_image
from tests.conftest import rows as image_rows
from tests.contracts import tiny_vlms
from tests.contracts.families import stable_diffusion

JUDGE = "tests.reliability.commands:brightness"
PROMPTS = ("a red circle", "a blue café", "两个 squares", "a green star")


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Judge: the mean of an image's pixels."""
    return [float(np.asarray(image).mean()) for image in images]


def write_inputs(folder: Path) -> None:
    """Write the models and the datasets that the commands read."""
    folder.mkdir(parents=True, exist_ok=True)
    stable_diffusion(folder / "sd")
    tiny_vlms.save("llama", folder / "llama")
    rows = image_rows(8)
    for number, row in enumerate(rows):
        row["prompt"] = PROMPTS[number % len(PROMPTS)]
        row["model_a"], row["model_b"] = "one", "two"
    make_image_rows(rows).to_parquet(str(folder / "pairs.parquet"))
    responses = [{**row, "id": f"row-{n}"} for n, row in enumerate(tiny_vlms.rows("llama", (0,) * 8))]
    make_response_rows(responses).to_parquet(str(folder / "responses.parquet"))
    (folder / "train.yaml").write_text("lora_rank: 4\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    questions = [{"prompt": f"{prompt}?", "ground_truth": "a é b"} for prompt in PROMPTS]
    lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "raw").mkdir()
    with (folder / "raw" / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("id", "prompt", "image_a", "image_b", "preference"))
        for number in range(8):
            table.writerow(
                (str(number), PROMPTS[number % 4], f"{number}.png", f"{(number + 1) % 8}.png", "ab"[number % 2])
            )
            noise_image(number).save(folder / "raw" / f"{number}.png")
    store = VoteStore(folder / "votes.sqlite", [str(row["id"]) for row in rows], source=str(folder / "pairs.parquet"))
    for _ in range(4):
        presented = store.next_pair("Zoë")
        assert presented is not None
        store.cast("Zoë", presented.id, "left")


def commands(inputs: Path, out: Path) -> dict[str, list[str]]:
    """Arguments of each command by name. It writes only into `out`."""
    images = {"model": inputs / "sd", "prompts": inputs / "prompts.txt", "judges": JUDGE, "images_per_prompt": 2}
    images |= {"num_inference_steps": 1, "guidance_scale": 1, "batch_size": 2}
    responses = {
        "model": inputs / "llama",
        "questions": inputs / "questions.jsonl",
        "max_new_tokens": 3,
        "batch_size": 2,
    }
    run = {"steps": 4, "save_every": 2, "batch_size": 2, "log_every": 1, "eval_fraction": 0, "learning_rate": 1e-3}
    train = ["train", str(inputs / "train.yaml")]
    return {
        "import": ["import", "custom-images", str(inputs / "raw"), str(out / "imported")],
        "mine images": ["mine", *flags(**images, shard_size=1, min_score_gap=0, output_dir=out / "mined")],
        "mine responses": ["mine", *flags(**responses, shard_size=1, judges="cer", output_dir=out / "failures")],
        "judge": ["judge", JUDGE, *flags(images=inputs / "pairs.parquet", output=out / "scores.parquet")],
        "relabel": [
            "relabel", str(inputs / "pairs.parquet"),
            *flags(judges=JUDGE, output=out / "relabelled.parquet", shard_size=2),
        ],
        "train images": [*train, *flags(model=inputs / "sd", pairs=inputs / "pairs.parquet", output_dir=out / "lora", **run)],
        "train responses": [
            *train,
            *flags(model=inputs / "llama", pairs=inputs / "responses.parquet", output_dir=out / "text", beta=0.1, **run),
        ],
        "compare images": ["compare", *flags(**images, output_dir=out / "compared")],
        "compare responses": ["compare", *flags(**responses, judges="cer", output_dir=out / "answers")],
        "label export": ["label", "export", str(inputs / "votes.sqlite"), *flags(output=out / "votes.parquet")],
        "doctor": ["doctor", str(inputs / "pairs.parquet"), *flags(output=out / "doctor.html")],
    }  # fmt: skip


def flags(**settings: Any) -> list[str]:
    """Settings as flags of the command line."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Environment of a command with its own cache."""
    return {**os.environ, "DPO_MM_CACHE": str(cache), **more}
