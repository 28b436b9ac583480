"""Settings that would have no effect are refused, and a schedule that depends on steps is right after a resume."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_response_rows
from dpo_mm.training.builders import validate_config
from dpo_mm.training.run import dry_run, train
from tests.contracts.tiny_vlms import save


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "full", "lora_rank": 8}, "lora_rank has no effect, because tuning is full"),
        ({"reference_ema_decay": 0.9}, "reference_ema_decay has no effect, because reference is auto"),
        ({"reference": "moving_average", "reference_sync_steps": 9}, "reference_sync_steps has no effect"),
        (
            {"objective": "sft", "reference": "adapter_off"},
            "reference has no effect, because objective sft has no reference",
        ),
        ({"schedule": "constant", "warmup_steps": 5}, "warmup_steps has no effect, because schedule is constant"),
        ({"eval_every": 5, "eval_fraction": 0}, "eval_every has no effect, because eval_fraction is 0"),
    ],
)
def test_setting_without_effect_is_refused(changes: dict[str, Any], message: str, tiny_model: str, out: str) -> None:
    """Catches each row of the table if it is removed."""
    with pytest.raises(ValueError, match=message):
        validate_config(TrainConfig(model=tiny_model, pairs="pairs", output_dir=out, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "beta is 5000.0, the default for image generators. Set beta for text"),
        ({"beta": 0.1, "ld_alpha": 0.5, "edited_token_weight": 5.0}, "ld_alpha has no effect"),
        ({"beta": 0.1, "fixed_draws_per_row": 4}, "fixed_draws_per_row has no effect"),
    ],
)
def test_setting_without_effect_on_text_is_refused(
    changes: dict[str, Any], message: str, text_model: str, out: str
) -> None:
    """Catches text that trains with the beta of Diffusion-DPO."""
    with pytest.raises(ValueError, match=message):
        validate_config(TrainConfig(model=text_model, pairs="pairs", output_dir=out, **changes))


def text_config(model: str, folder: Path, **changes: Any) -> TrainConfig:
    rows = [{"id": str(n), "prompt": f"q {n}", "chosen": "a red", "rejected": "a dot"} for n in range(4)]
    make_response_rows(rows).to_parquet(folder / "pairs.parquet")
    config = TrainConfig(model=model, pairs=str(folder / "pairs.parquet"), output_dir=str(folder / "out"), beta=0.1)
    return dataclasses.replace(config, batch_size=2, eval_fraction=0, log_every=1, **changes)


def test_dataset_without_a_row_left_is_refused(text_model: str, tmp_path: Path) -> None:
    """Catches a division by zero in the order of the rows."""
    with pytest.raises(ValueError, match=r"pairs.parquet: none of its 4 rows is left to train on.*raise max_length"):
        train(text_config(text_model, tmp_path, max_length=3, overlong_rows="drop"))


def test_decaying_schedule_resumed_with_more_steps(
    text_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches the learning rate 0 of the shorter schedule's end, which the optimizer's state contains."""
    config = text_config(text_model, tmp_path, schedule="linear", learning_rate=0.01, steps=2, save_every=2)
    train(config)
    with caplog.at_level(logging.WARNING):
        train(dataclasses.replace(config, steps=4, save_every=4, resume=True))
    history = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([0.01, 0.005, 0.005, 0.0025])
    assert "schedule linear depends on steps, which were 2. From step 3 on" in caplog.text
    with pytest.raises(ValueError, match=r"steps is 3, but .*checkpoint-4 is after step 4"):
        train(dataclasses.replace(config, steps=3, resume=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_fraction": 0.01, "eval_every": 1}, r"eval_fraction 0\.01 of its 12 pairs is less than one prompt"),
        ({"steps": 0}, "steps is 0. Expected a value at least 1"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05. Expected a value at least 0"),
        ({"eval_fraction": 2.0}, "eval_fraction is 2.0. Expected a value in"),
    ],
)
def test_dry_run_refuses_what_training_refuses(
    settings: dict[str, Any], message: str, tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    """Fails if the evaluation split is only checked when the trainer is built."""
    for command in (dry_run, train):
        with pytest.raises(ValueError, match=message):
            command(TrainConfig(tiny_model, pairs, str(tmp_path / "out"), **{"steps": 1, **settings}))
