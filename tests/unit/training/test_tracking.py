"""Trackers get the numbers of the log, the plan comes before the first step, and the bar shows the last loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_mm.config import TrainConfig
from dpo_mm.training.builders import validate_config
from dpo_mm.training.callbacks import bar_title
from dpo_mm.training.run import train
from tests.unit.training.test_trainer import config, first_difference, weights


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Values of TensorBoard's scalars by name and step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_log_and_training_is_unchanged(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """It catches a tracker that draws random numbers, and curves under other names or steps."""
    plain = train(config(tiny_model, pairs, str(tmp_path / "plain"), steps=2))
    plans: list[dict[str, str]] = []

    def show_plan(summary: dict[str, str]) -> None:
        plans.append(summary)
        assert not list((tmp_path / "tracked").glob("*.safetensors"))  # before anything is trained

    tracked = train(
        config(tiny_model, pairs, str(tmp_path / "tracked"), steps=2, report_to=("tensorboard",)), show_plan=show_plan
    )
    assert plans == [tracked.settings]
    assert first_difference(weights(plain.folder), weights(tracked.folder)) is None and plain.history == tracked.history
    (folder,) = (tracked.folder / "logs").iterdir()
    scalars = read_scalars(folder)
    for entry in tracked.history:
        side = "eval" if "eval_loss" in entry else "train"
        for name, value in entry.items():
            if name not in ("step", "epoch"):
                assert scalars[f"{side}/{name.removeprefix('eval_')}"][int(entry["step"])] == pytest.approx(
                    value, rel=1e-6
                )
    assert {"train/loss", "train/rewards/accuracies", "eval/loss"} <= set(scalars)
    again = train(config(tiny_model, pairs, str(tmp_path / "tracked"), steps=2), show_plan=plans.append)
    assert again.history == tracked.history and len(plans) == 2  # finished: without a tracker too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": ("tensorbord",)}, "report_to: tracker 'tensorbord' is unknown; did you mean 'tensorboard'?"),
        ({"report_to": ("comet_ml",)}, "report_to: comet_ml is not installed. pip install comet_ml"),
        ({"logging_dir": "logs"}, "logging_dir has no effect without report_to: tensorboard. Remove one"),
        ({"run_name": "a"}, "run_name has no effect without report_to. Remove one"),
    ],
)
def test_tracker_that_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_config(TrainConfig("shapes-sd", "shapes-faithfulness", "out", **changes))


def test_title_of_the_bar_fits_its_column() -> None:
    title = bar_title({"loss": 0.69314, "rewards/accuracies": 0.5, "learning_rate": 1e-4})
    assert title == "loss 0.693, acc 0.50" or torch.cuda.is_available()
    assert bar_title({"loss": 12.5}).startswith("loss 12.500")
