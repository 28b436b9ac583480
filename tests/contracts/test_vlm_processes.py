"""Two processes give the same losses as one for a vision-language model, in real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_response_rows
from dpo_mm.training import response_rows
from dpo_mm.training.run import train
from tests import forked
from tests.contracts.tiny_vlms import rows, save

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "steps": 3, "save_every": 3, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, "lora_rank": 4, "beta": 0.1,
}  # fmt: skip


def history(folder: Path, step: int = 3) -> list[dict[str, Any]]:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def streamed() -> None:
    """Run the command line with rows that are encoded in the steps, by processes that are forked as from a shell."""
    multiprocessing.set_start_method("fork", force=True)
    response_rows.MAX_BYTES_IN_MEMORY = 0
    forked.command()


def test_two_processes_give_the_losses_of_one_for_a_vlm(tmp_path: Path) -> None:
    pairs = rows("qwen2_5_vl", (1, 2, 1, 1, 2, 1))
    for row in pairs:
        row["images"] = [{"bytes": encode_png(image), "path": None} for image in row["images"]]
    make_response_rows(pairs).to_parquet(str(tmp_path / "pairs.parquet"))
    settings = {"model": save("qwen2_5_vl", tmp_path / "model"), "pairs": str(tmp_path / "pairs.parquet"), **SETTINGS}
    train(TrainConfig(**settings, batch_size=4, output_dir=str(tmp_path / "one")))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**settings, "batch_size": 2}))
    forked.run_together("train", str(tmp_path / "two.yaml"), "--output-dir", str(tmp_path / "two"))
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        values = [[entry[name] for entry in log if name in entry] for log in (one, two)]
        assert len(values[0]) == 3 and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4)
    assert abs(one[2]["rewards/margins"]) > 1e-2 and (tmp_path / "two" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_two_processes_with_streamed_rows_resume_and_give_the_losses_of_one(family: str, tmp_path: Path) -> None:
    """One image is broken. Two processes share features and reference log-probs, and continue the checkpoint of two."""
    pairs = rows(family, (1, 2, 1, 1, 2, 1, 1) if family != "llama" else (0,) * 7)
    for row in pairs:
        row["images"] = [{"bytes": encode_png(image), "path": None} for image in row["images"]]
    if pairs[2]["images"]:
        pairs[2]["images"][0]["bytes"] = pairs[2]["images"][0]["bytes"][:-200]
    make_response_rows(pairs).to_parquet(str(tmp_path / "pairs.parquet"))
    settings = {"model": save(family, tmp_path / "model"), "pairs": str(tmp_path / "pairs.parquet"), **SETTINGS}
    settings |= {"undecodable_images": "drop", "train_sampling_strategy": "group_by_length"}
    settings |= {"reference": "precomputed", "cache_vision_features": True} if family == "llama" else {"workers": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", str(tmp_path / "recipe.yaml"), "--save-every", "2"]
    for name, count, steps in (("one", 1, 4), ("two", 2, 2), ("two", 2, 4)):
        more = ["--batch-size", str(4 // count), "--steps", str(steps), "--output-dir", str(tmp_path / name)]
        environment = {**os.environ, "DPO_MM_CACHE": str(tmp_path / f"cache-{name}")}
        resume = ["--resume"] if (tmp_path / name).exists() else []
        forked.run_together(*command, *more, *resume, count=count, call=streamed, env=environment)
    one, two = history(tmp_path / "one", 4), history(tmp_path / "two", 4)
    for key in ("loss", "rewards/margins", "rewards/chosen"):
        values = [[entry[key] for entry in log if key in entry] for log in (one, two)]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], abs=1e-5)
    lists = [(tmp_path / name / "quarantine.jsonl") for name in ("one", "two")]
    assert [path.exists() for path in lists] == [family != "llama"] * 2
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()
