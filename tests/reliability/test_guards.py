"""Non-finite steps, SIGTERM, and incomplete checkpoints, in real runs."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.training import trainer as module
from dpo_mm.training.callbacks import MAX_CONSECUTIVE_SKIPS, SkipNonFiniteStepsCallback
from dpo_mm.training.checkpoints import latest_complete_checkpoint, what_is_wrong
from dpo_mm.training.run import train
from dpo_mm.training.trainer import PreferenceTrainer
from tests import forked


def config(model: str, pairs: str, out: Path, **more: Any) -> TrainConfig:
    settings = {"steps": 8, "batch_size": 2, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(out), **settings)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "pytorch_lora_weights.safetensors")


def make_loss_nan(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Replace the loss of these steps with NaN."""
    compute_loss = PreferenceTrainer.compute_loss

    def loss(self: PreferenceTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        value = compute_loss(self, *arguments, **named)
        return value * float("nan") if self.state.global_step in steps else value

    monkeypatch.setattr(module.PreferenceTrainer, "compute_loss", loss)


def test_nan_loss_skips_the_step_and_is_counted(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tiny_model, pairs, tmp_path / "two", steps=2, schedule="constant"))
    make_loss_nan(monkeypatch, {2, 3})
    result = train(config(tiny_model, pairs, tmp_path / "four", steps=4, schedule="constant"))
    expected, skipped_two = weights(tmp_path / "two"), weights(tmp_path / "four")
    assert all(torch.equal(expected[name], skipped_two[name]) for name in expected)
    assert [e["skipped_steps"] for e in result.history if "skipped_steps" in e][-1] == 2


@pytest.mark.slow
def test_many_consecutive_skips_end_the_run_with_a_diagnosis(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loss_nan(monkeypatch, set(range(3, 1000)))
    with pytest.raises(
        FloatingPointError,
        match=rf"{MAX_CONSECUTIVE_SKIPS} steps in a row up to step {3 + MAX_CONSECUTIVE_SKIPS} .* learning_rate .*none is finite.*"
        r"every loss is finite, rows row-\d+ at timestep \d+ \(loss [\d.]+\), row-\d+ at",
    ):
        train(config(tiny_model, pairs, tmp_path, steps=100))


def test_diagnosis_names_the_non_finite_row_its_timestep_and_the_norms() -> None:
    """Mutations that it catches: naming every row, norms after clipping, rows of the previous step."""
    callback, layer = SkipNonFiniteStepsCallback(), torch.nn.Linear(2, 2)
    callback.record_batch(["earlier"], None, torch.tensor([torch.nan]))
    layer(torch.ones(1, 2)).sum().backward()
    state = SimpleNamespace(global_step=6)
    callback.on_pre_optimizer_step(None, state, None, model=layer)
    assert callback.skipped == 0 and layer.weight.grad is not None
    callback.record_batch(["a", "b"], torch.tensor([10, 900]), torch.tensor([0.5, torch.inf]))
    callback.record_batch(["c"], torch.tensor([7]), torch.tensor([0.25]))
    layer.weight.grad[0, 0] = torch.inf
    callback.measure(layer)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    diagnosis = callback.diagnosis()
    assert "not finite in 1 of 2 tensors, first weight (largest finite norm 1.41)" in diagnosis
    assert diagnosis.endswith("rows b at timestep 900 (loss inf)") and "earlier" not in diagnosis
    callback.on_pre_optimizer_step(None, state, None, model=layer)
    assert (callback.skipped, layer.weight.grad, callback.batches) == (1, None, [])


@pytest.mark.slow
def test_sigterm_saves_exits_and_resumes_to_the_same_adapter(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\npairs: {pairs}\nlearning_rate: 1.0e-3\nsteps: 30\nbatch_size: 2\nsave_every: 2\n"
    )
    command = ["train", str(recipe), "--output-dir"]
    out = tmp_path / "cut"
    process = forked.Forked(*command, str(out))
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    done = process.wait(timeout=120)
    errors = done.stderr
    assert (
        done.returncode == 143
        and "stopped after step" in errors
        and "and the same command resumes: dpo-mm train" in errors
    )
    step = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert f"step {step} and" in errors and step < 30 and not (out / "pytorch_lora_weights.safetensors").exists()

    forked.run(*command, str(out), "--resume", check=True)
    forked.run(*command, str(tmp_path / "whole"), check=True)
    expected, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.fixture(scope="module")
def finished(tiny_model: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with two checkpoints, which tests copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config(tiny_model, pairs, folder, save_every=4))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["truncate", "remove", "unmark"])
def test_incomplete_checkpoint_is_skipped_and_named_in_a_warning(
    harm: str, tiny_model: str, pairs: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoint-8"
    if harm == "truncate":
        with (newest / "optimizer.pt").open("r+b") as file:
            file.truncate(100)
    elif harm == "remove":
        (newest / "trainer_state.json").unlink()
    else:
        (newest / "complete.json").unlink()
    assert what_is_wrong(tmp_path / "checkpoint-4") is None
    with caplog.at_level(logging.WARNING, logger="dpo_mm.training.checkpoints"):
        assert latest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert "checkpoint-8" in caplog.text and "taking the one before" in caplog.text
    before = weights(tmp_path)
    (tmp_path / "complete.json").unlink()  # otherwise the finished result is returned
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    train(config(tiny_model, pairs, tmp_path, save_every=4, resume=True))
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_without_a_complete_checkpoint_raises(
    tiny_model: str, pairs: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole .*optimizer.pt is missing"):
        train(config(tiny_model, pairs, tmp_path, save_every=4, resume=True))


def test_checkpoint_lists_its_files(finished: Path) -> None:
    files = json.loads((finished / "checkpoint-4" / "complete.json").read_text())
    assert {"optimizer.pt", "trainer_state.json", "dpo_mm.json", "pytorch_lora_weights.safetensors"} <= set(files)
