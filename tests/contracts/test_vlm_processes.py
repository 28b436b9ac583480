"""Two processes give the same losses as one for a vision-language model, in real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_response_rows
from dpo_mm.training.run import train
from tests import forked
from tests.contracts.tiny_vlms import rows, save

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "steps": 3, "save_every": 3, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, "lora_rank": 4, "beta": 0.1,
}  # fmt: skip


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]


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
