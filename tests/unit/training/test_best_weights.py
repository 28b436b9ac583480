"""Tests of the weights of the best evaluation, and of the end of a run that no longer improves."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.training import best_weights
from dpo_mm.training.best_weights import BestWeightsCallback
from dpo_mm.training.builders import validate_config
from dpo_mm.training.run import train
from tests.unit.training.test_trainer import config, first_difference, weights

EVALUATED: dict[str, Any] = {
    "steps": 6,
    "eval_fraction": 0.34,
    "eval_every": 1,
    "metric_for_best_model": "eval_loss",
    "learning_rate": 0.3,
}


@pytest.mark.parametrize(
    ("metric", "values", "saved_at", "stops_after"),
    [
        ("eval_loss", [3.0, 2.0, 2.0, 2.5, 1.0], [1, 2], 4),  # the first of equal values; stops before the best
        ("eval_loss", [3.0, 2.0, 1.0, 0.5, 0.4], [1, 2, 3, 4, 5], None),
        ("eval_rewards/accuracies", [0.5, 0.7, 0.6, 0.8, 0.7], [1, 2, 4], None),
        ("eval_loss", [math.nan, 2.0, 1.0, math.nan, math.nan], [2, 3], 5),
        ("eval_rewards/margins", [math.inf, 2.0, 3.0, math.inf, 4.0], [2, 3, 5], None),
        ("eval_loss", [math.nan, math.nan, 1.0], [], 2),
    ],
)
def test_best_value_is_saved_and_patience_ends_the_run(
    metric: str, values: list[float], saved_at: list[int], stops_after: int | None, tmp_path: Path
) -> None:
    saved: list[int] = []
    settings = TrainConfig("m", "p", str(tmp_path), metric_for_best_model=metric, early_stopping_patience=2)
    policy: Any = SimpleNamespace(save=lambda folder: saved.append(step))
    callback, history, stopped = BestWeightsCallback(policy, settings), [], None
    for step, value in enumerate(values, start=1):
        history.append({"step": step, metric: value})
        control = SimpleNamespace(should_training_stop=False)
        callback.on_log(None, SimpleNamespace(log_history=history), control, logs={metric: value})
        if control.should_training_stop:
            stopped = step
            break
    assert saved == saved_at and stopped == stops_after
    end = f". The run ended at step {stops_after}, after 2 values that are not better"
    assert callback.early_end(history) == (end if stops_after else "")


@pytest.mark.slow
def test_result_is_that_of_the_run_that_ends_at_the_best_step(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """With this learning rate, later steps are worse."""
    shown: list[dict[str, str]] = []
    stops = config(tiny_model, pairs, str(tmp_path / "best"), **EVALUATED, early_stopping_patience=2)
    result = train(stops, show_plan=shown.append)
    losses = {int(entry["step"]): entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert 1 <= best < max(losses) == best + 2 < 6, losses
    assert result.settings["result"].startswith(f"weights of step {best}, whose eval_loss is best")
    assert shown[1:] == [{"result": result.settings["result"]}]
    short = train(config(tiny_model, pairs, str(tmp_path / "short"), steps=best, learning_rate=0.3, eval_fraction=0.34))
    assert first_difference(weights(result.folder), weights(short.folder)) is None
    assert train(stops).history == result.history


@pytest.mark.slow
def test_interrupted_run_remembers_its_best_step(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(tiny_model, pairs, str(tmp_path / "whole"), **EVALUATED))
    settings = config(tiny_model, pairs, str(tmp_path / "parts"), **EVALUATED, save_every=3)
    on_log = BestWeightsCallback.on_log

    def killed(self: BestWeightsCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise TrainingInterrupted(15, "killed")
        on_log(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        patch.setattr(BestWeightsCallback, "on_log", killed)
        train(settings)
    resumed = train(dataclasses.replace(settings, resume=True))
    assert resumed.settings["result"] == whole.settings["result"]
    assert first_difference(weights(whole.folder), weights(resumed.folder)) is None
    assert json.loads((resumed.folder / best_weights.BEST_FOLDER / "step.json").read_text())["step"] >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience has no effect without metric_for_best_model"),
        ({"metric_for_best_model": "eval_los", "eval_every": 1}, "'eval_los' is unknown; did you mean 'eval_loss'"),
        ({"metric_for_best_model": "eval_loss"}, "'eval_loss' needs eval_every, the steps between two evaluations"),
        (
            {"metric_for_best_model": "samples/aesthetic"},
            "needs sample_steps, and one of sample_judges \\(none\\) after samples/",
        ),
        ({"metric_for_best_model": "eval_rewards/margins", "objective": "sft", "eval_every": 1}, "is unknown"),
        (
            {"metric_for_best_model": "eval_rewards/accuracies", "objective": "mapo", "eval_every": 1},
            "is unknown; known: eval_loss",
        ),
    ],
)
def test_metric_that_is_not_measured_is_refused(changes: dict[str, Any], message: str, tiny_model: str) -> None:
    values: dict[str, Any] = {"eval_fraction": 0.3, **changes}
    with pytest.raises(ValueError, match=message):
        validate_config(TrainConfig(tiny_model, "pairs", "out", **values))
