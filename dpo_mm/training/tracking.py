"""Experiment trackers: the integrations of transformers' Trainer, such as TensorBoard, get the log of a run."""

from __future__ import annotations

import html
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from dpo_mm.config import TrainConfig
from dpo_mm.errors import did_you_mean, one_line

TRACKING_SETTINGS = ("report_to", "run_name", "logging_dir")
"""Settings that do not change what a run computes."""
PACKAGES = {"comet_ml": "comet_ml", "dvclive": "dvclive", "neptune": "neptune", "azure_ml": "azureml"}
"""Packages of trackers whose name is another one."""
EXTRA = {"tensorboard": "'dpo-mm[tracking]'"}
"""What installs a tracker, if it is not its own name."""


def validate_trackers(config: TrainConfig) -> None:
    """Refuse trackers that are unknown or not installed, and settings without effect. Raises ValueError."""
    for name in config.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: tracker {name!r} is unknown; {did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if importlib.util.find_spec(PACKAGES.get(name, name)) is None:
            raise ValueError(f"report_to: {name} is not installed. pip install {EXTRA.get(name, name)}")
    if config.logging_dir is not None and "tensorboard" not in config.report_to:
        raise ValueError("logging_dir has no effect without report_to: tensorboard. Remove one of the two settings")
    if config.run_name is not None and not config.report_to:
        raise ValueError("run_name has no effect without report_to. Remove one of the two settings")


def prepare_trackers(callbacks: Sequence[TrainerCallback], config: TrainConfig) -> None:
    """Set the folder of TensorBoard's callback, hide the model from all trackers, and name one that does not start.

    They would write its config, which they expect to be one of transformers.
    """
    start = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = {INTEGRATION_TO_CALLBACK[name]: name for name in config.report_to}
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = config.logging_dir or str(Path(config.output_dir) / "logs" / start)
        if type(callback) in names:
            for event in (name for name in dir(callback) if name.startswith("on_")):
                setattr(callback, event, _without_model(getattr(callback, event)))
            callback.on_train_begin = _explain_start(callback.on_train_begin, names[type(callback)])  # type: ignore[method-assign]


def show_samples(callback: TrainerCallback, step: int, samples: Mapping[str, Image.Image | str]) -> None:
    """Show images and texts by name in TensorBoard, W&B or Trackio. The others show numbers only."""
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        for name, sample in samples.items():
            if isinstance(sample, str):
                callback.tb_writer.add_text(name, f"```\n{sample}\n```", step)
            else:
                callback.tb_writer.add_image(name, np.asarray(sample.convert("RGB")), step, dataformats="HWC")
        callback.tb_writer.flush()
    elif isinstance(callback, WandbCallback):
        wandb = callback._wandb
        shown = {name: _shown(sample, wandb.Image, wandb.Html) for name, sample in samples.items()}
        wandb.log({**shown, "train/global_step": step})
    elif isinstance(callback, TrackioCallback):
        trackio = callback._trackio
        shown = {name: _shown(sample, trackio.Image, trackio.Markdown) for name, sample in samples.items()}
        trackio.log({**shown, "train/global_step": step})


def _shown(sample: Image.Image | str, as_image: Callable[..., Any], as_text: Callable[..., Any]) -> Any:
    """Sample in the classes of a tracker. A text is data of the model, so its markup is escaped."""
    return as_text(f"<pre>{html.escape(sample)}</pre>") if isinstance(sample, str) else as_image(sample)


def _without_model(event: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, model=None, **keywords: event(*arguments, **keywords)


def _explain_start(event: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Turn the error of a tracker without an account or a server into one line."""

    def start(*arguments: Any, **keywords: Any) -> Any:
        try:
            return event(*arguments, **keywords)
        except Exception as error:
            raise ValueError(
                f"report_to: {name} does not start ({one_line(error)}). Fix it, or leave {name} out of report_to"
            ) from error

    return start
