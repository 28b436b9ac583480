"""Trackers get the numbers of the log, the plan comes before the first step, and the bar shows the last loss."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from dpo_mm.config import TrainConfig, as_dict
from dpo_mm.printing.progress import progress_bar
from dpo_mm.training.builders import validate_config
from dpo_mm.training.callbacks import bar_title
from dpo_mm.training.run import run_training, train
from dpo_mm.training.run_inputs import FileInputs
from dpo_mm.training.tracking import show_samples
from tests.unit.training.test_trainer import config, first_difference, weights


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Values of TensorBoard's scalars by name and step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_has_the_log_and_training_is_unchanged(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """It catches a tracker that draws random numbers, and curves under other names or steps."""
    plain = train(config(tiny_model, pairs, str(tmp_path / "plain"), steps=2, eval_fraction=0.34))
    plans: list[dict[str, str]] = []

    def show_plan(summary: dict[str, str]) -> None:
        plans.append(summary)
        assert not list((tmp_path / "tracked").glob("*.safetensors"))  # before anything is trained

    tracked = train(
        config(tiny_model, pairs, str(tmp_path / "tracked"), steps=2, eval_fraction=0.34, report_to=("tensorboard",)),
        show_plan=show_plan,
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
    again = train(
        config(tiny_model, pairs, str(tmp_path / "tracked"), steps=2, eval_fraction=0.34), show_plan=plans.append
    )
    assert again.history == tracked.history and len(plans) == 2  # finished: without a tracker too


def wandb_log(folder: Path) -> list[dict[str, float]]:
    """Numbers that an offline run of W&B has on disk, by step of the log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    entries = []
    for data in leveldb_records(file.read_bytes()[7:]):
        record = Record()
        record.ParseFromString(data)
        entries.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return [entry for entry in entries if entry]


def leveldb_records(log: bytes, start: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: checksum, length and kind of each piece, in blocks. `start`: where the log starts."""
    at, record = 0, b""
    while at + 7 <= len(log):
        if block - (at + start) % block < 7:
            at += block - (at + start) % block
            continue
        size, kind = struct.unpack_from("<HB", log, at + 4)
        record += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def trackio_log(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.glob("*.db")
    with sqlite3.connect(file) as database:
        return [json.loads(line) for (line,) in database.execute("select metrics from metrics order by id")]


def mlflow_log(folder: Path) -> list[dict[str, float]]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute("select step, key, value from metrics order by step").fetchall()
    return [{f"train/{key}": value for at, key, value in rows if at == step} for step in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("tracker", "read"), [("wandb", wandb_log), ("trackio", trackio_log), ("mlflow", mlflow_log)])
def test_other_trackers_have_the_log_on_this_machine(
    tracker: str, read: Callable[[Path], list[dict[str, float]]], tiny_model: str, pairs: str, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip(tracker)
    plain = config(tiny_model, pairs, str(tmp_path / "plain"), steps=2)
    history = train(plain).history
    places = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path}
    places |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    samples = {"sample_prompts": str(tmp_path / "prompts.txt"), "num_inference_steps": 1}
    tracked = {"output_dir": str(tmp_path / "run"), "report_to": tracker, "run_name": "mine", **samples}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(as_dict(plain) | tracked))))
    command = [sys.executable, "-m", "dpo_mm", "train", str(tmp_path / "run.yaml")]
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    subprocess.run(
        command, check=True, env=environment, cwd=tmp_path
    )  # trackers read their settings when they are imported
    assert first_difference(weights(tmp_path / "plain"), weights(tmp_path / "run")) is None
    logged = [entry for entry in read(tmp_path) if "train/loss" in entry]
    assert len(history) == len(logged) == 2
    for entry, found in zip(history, logged, strict=True):
        numbers = {f"train/{name}": value for name, value in entry.items() if name != "step"}
        assert {name: found.get(name) for name in numbers} == numbers
    images = [path for path in tmp_path.rglob("*.png") if "run/samples" not in path.as_posix()]
    assert len(images) == (0 if tracker == "mlflow" else 4)  # two prompts before and after training


@pytest.mark.parametrize(("kind", "module"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_samples_are_shown_in_trackers_with_their_step(kind: type[Any], module: str) -> None:
    """It catches markup of a response that the tracker's page would run."""
    logged: list[dict[str, Any]] = []
    tracker, image = kind.__new__(kind), Image.new("RGB", (2, 2))
    classes = {"Image": lambda sample: ("image", sample), "Html": str, "Markdown": str}
    setattr(tracker, module, SimpleNamespace(log=logged.append, **classes))
    show_samples(tracker, 3, {"samples/1 red": image, "samples/2 q": "<script>"})
    text = "<pre>&lt;script&gt;</pre>"
    assert logged == [{"samples/1 red": ("image", image), "samples/2 q": text, "train/global_step": 3}]


def test_tracker_that_does_not_start_is_one_line(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as W&B without an account."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(TensorBoardCallback, "on_train_begin", refuse)
    message = "report_to: tensorboard does not start (No API key configured. Use `wandb login` to log in.). Fix it, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config(tiny_model, pairs, str(tmp_path / "run"), steps=1, report_to=("tensorboard",)))


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


def test_bar_shows_the_last_values_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It catches a value that is left out, and a title that is cut or broken into two lines."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 78 * 2**30)
    title = "loss 0.693, acc 0.50, lr 1.5e-05, 78.0 GiB"
    logs = {"loss": 0.69314, "rewards/accuracies": 0.5, "learning_rate": 1.5e-5}
    with progress_bar("training", 20000) as advance:
        advance(20000, bar_title(logs))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{title} ━━━") and "20000/20000 " in line and len(line) <= 80
    assert bar_title({"loss": 12.5}) == "loss 12.500, 78.0 GiB"


def test_table_of_log_keys_names_every_value_of_a_run(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """It catches a metric that no page explains."""
    page = (Path(__file__).parents[3] / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    table = page.partition("## Log keys")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\|.*?\|", table, re.MULTILINE))))
    named |= {name.replace("1", number) for name in named if name.endswith("quartile1") for number in "234"}
    trained = run_training(
        settings := config(tiny_model, pairs, str(tmp_path), steps=1, eval_fraction=0.5), FileInputs(settings)
    )
    assert trained.trainer is not None
    keys = {key for entry in trained.trainer.state.log_history for key in entry} - {"step"}
    assert len(keys) > 20 and {key for key in keys if not {key, key.removeprefix("eval_")} & named} == set()
