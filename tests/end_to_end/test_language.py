"""Vision-language and text models train with the same trainer, objectives and references as image models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from datasets import Dataset

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import response_preference
from dpo_mm.training.run import train
from tests.contracts.tiny_vlms import rows, save


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_language_model_trains_from_a_parquet_file(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    images = 0 if family == "llama" else 1
    examples = [{**row, "id": f"row-{n}"} for n, row in enumerate(rows(family, (images,) * 8))]
    columns = list(response_preference())
    table = Dataset.from_list(
        [{name: row.get(name) for name in columns} for row in examples], features=response_preference()
    )
    table.to_parquet(str(tmp_path / "pairs.parquet"))
    config = TrainConfig(
        model=model,
        pairs=str(tmp_path / "pairs.parquet"),
        output_dir=str(tmp_path / "out"),
        beta=0.1,
        sft_weight=0.1,
        steps=6,
        batch_size=2,
        learning_rate=1e-2,
        log_every=1,
        eval_fraction=0.0,
    )
    result = train(config)
    losses = [entry for entry in result.history if "loss" in entry]
    assert losses[0]["rewards/accuracies"] == 0.5 and losses[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert losses[0]["loss"] > math.log(2)
    assert losses[-1]["rewards/margins"] > 0 and "errors/chosen" not in losses[-1]
    assert (tmp_path / "out" / "adapter_config.json").exists()
