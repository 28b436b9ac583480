"""Tests of the length of a run in epochs, and of warm-up as a fraction of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.training.builders import steps_of_epochs, training_arguments, validate_config
from dpo_mm.training.run import dry_run, train

CONFIG = TrainConfig("shapes-sd", "pairs.parquet", "out", batch_size=4, accumulate=2, num_train_epochs=3)


@pytest.mark.parametrize(
    ("settings", "num_pairs", "processes", "steps"),
    [
        ({}, 80, 1, 30),
        ({}, 81, 1, 31),  # 243 pairs in steps of 8
        ({}, 80, 2, 15),
        ({"num_train_epochs": 0.5}, 80, 1, 5),
        ({"num_train_epochs": 0.01}, 80, 1, 1),
        ({"antithetic_noise": True}, 80, 1, 60),
        ({"num_train_epochs": None, "steps": 7}, 80, 1, 7),
    ],
)
def test_epochs_as_steps(settings: dict[str, Any], num_pairs: int, processes: int, steps: int) -> None:
    assert steps_of_epochs(dataclasses.replace(CONFIG, **settings), num_pairs, processes).steps == steps


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0.1, 30, 3), (0.1, 31, 4), (5, 30, 5), (0, 30, 0)])
def test_warmup_below_one_is_a_fraction_of_the_steps(warmup: float, steps: int, expected: int) -> None:
    config = dataclasses.replace(CONFIG, num_train_epochs=None, steps=steps, warmup_steps=warmup)
    assert training_arguments(config).get_warmup_steps(steps) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 50}, r"steps has no effect, because num_train_epochs is 3\. Remove one"),
        ({"warmup_steps": 1.5}, r"warmup_steps is 1\.5\. Expected a whole number, or a fraction of all steps below 1"),
        ({"num_train_epochs": 0}, r"num_train_epochs is 0\. Expected a value above 0"),
    ],
)
def test_contradicting_durations_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_config(dataclasses.replace(CONFIG, **settings))


@pytest.mark.slow
def test_run_of_two_epochs_is_a_run_of_its_steps_and_continues(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "eval_fraction": 0.0, "lora_rank": 2, "log_every": 1, "save_every": 3}
    settings |= {"schedule": "linear", "warmup_steps": 0.4}
    config = TrainConfig(tiny_model, pairs, str(tmp_path / "epochs"), num_train_epochs=2, **settings)
    assert dry_run(config)["steps"] == "6 of 4 x 1 pairs per process (2 epochs)"
    result = train(config)
    by_steps = train(TrainConfig(tiny_model, pairs, str(tmp_path / "steps"), steps=6, **settings))
    assert result.history == by_steps.history and len([e for e in result.history if "loss" in e]) == 6
    assert train(config).history == result.history  # finished, nothing is trained again
    longer = train(dataclasses.replace(config, num_train_epochs=3, resume=True))
    assert max(entry["step"] for entry in longer.history) == 9
    assert json.loads((tmp_path / "epochs" / "dpo_mm.json").read_text())["num_train_epochs"] == 3
    with pytest.raises(ValueError, match=r"num_train_epochs is 1 and steps is 3, but .*checkpoint-9 is after step 9"):
        train(dataclasses.replace(config, num_train_epochs=1, resume=True))
