"""References that follow the policy, and those that were asked before training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import LogProbs
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import training_arguments
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import (
    REFERENCE_FILE,
    TrackingReference,
    adapter_off,
    build_reference,
    precompute_reference_log_probs,
)
from dpo_mm.training.run import train


def config(model: str, pairs: str, out: Path, **more: Any) -> TrainConfig:
    given = {"steps": 6, "batch_size": 3, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(out), **given)


class Line:
    """A policy of two numbers, one of them frozen."""

    with_encoders = None

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.model.weight.data.fill_(1.0)
        self.model.bias.requires_grad_(False)

    def log_probs(self, model: Any, batch: Any) -> float:
        assert not torch.is_grad_enabled()
        return self.model.weight.item()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("moving_average", [1.25, 1.6875, 2.265625]), ("synced", [1.0, 3.0, 3.0])],
)
def test_tracking_reference_equals_hand_arithmetic(name: str, wanted: list[float]) -> None:
    """Mutations that it catches: decay for 1 - decay, following before the step, weights that aren't given back."""
    policy = Line()
    made = build_reference(
        policy, TrainConfig("-", "-", "-", reference=name, reference_ema_decay=0.75, reference_sync_steps=2)
    )
    assert isinstance(made, TrackingReference) and list(made.reference_params) == ["weight"]
    found = []
    for step, value in enumerate((2.0, 3.0, 4.0), start=1):
        policy.model.weight.data.fill_(value)
        made.update(step)
        found.append(made(policy.model, {}))
        assert policy.model.weight.item() == value
    assert found == wanted


def test_tracking_reference_has_no_gradient_and_restores_weights_after_an_error() -> None:
    policy = Line()
    made = TrackingReference(policy, decay=0.0, every=1)
    policy.model.weight.data.fill_(5.0)

    def fail(model: Any, batch: Any) -> float:
        raise RuntimeError

    policy.log_probs = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        made(policy.model, {})
    assert policy.model.weight.item() == 5.0 and policy.model.weight.requires_grad


def test_invalid_reference_settings_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference_ema_decay must be in"):
        TrackingReference(Line(), decay=1.0, every=1)
    with pytest.raises(ValueError, match="reference_sync_steps must be at least 1"):
        TrackingReference(Line(), decay=0.5, every=0)
    with pytest.raises(ValueError, match=f"{REFERENCE_FILE} is missing"):
        TrackingReference(Line(), decay=0.5, every=1).load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moving_average", "synced"])
def test_tracking_reference_is_saved_in_checkpoints(name: str, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Cut at 4 of 6, with the reference last renewed at 3: resumed to the same bits, which a fresh reference isn't."""
    own = {"moving_average": {"reference_ema_decay": 0.5}, "synced": {"reference_sync_steps": 3}}[name]
    more = {"reference": name, "save_every": 4, **own}
    whole = train(config(tiny_model, pairs, tmp_path / "whole", **more))
    cut = config(tiny_model, pairs, tmp_path / "cut", **more)
    train(dataclasses.replace(cut, steps=4))
    kept = load_file(tmp_path / "cut" / "checkpoint-4" / REFERENCE_FILE)
    assert kept and not (tmp_path / "cut" / REFERENCE_FILE).exists()
    resumed = train(dataclasses.replace(cut, resume=True))
    losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert same(whole.folder, resumed.folder)
    frozen = train(config(tiny_model, pairs, tmp_path / "frozen"))
    assert not same(whole.folder, frozen.folder)


def same(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stratified_timesteps", [False, True])
def test_precomputed_references_equal_online_ones_bit_for_bit(
    stratified_timesteps: bool, tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    """12 rows at 2 draws in batches of 5, which don't divide them, met in other company than when they were asked."""
    given = config(
        tiny_model, pairs, tmp_path, batch_size=5, fixed_draws_per_row=2, stratified_timesteps=stratified_timesteps
    )
    policy = load_policy(tiny_model)
    rows = encode_splits(policy, given).rows
    policy.prepare(given)
    fixed = PairStream(rows, seed=0, length=0, num_fixed_draws=2, num_strata=5 * stratified_timesteps)
    kept = precompute_reference_log_probs(policy, fixed, given)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    stream = PairStream(kept, seed=0, length=60, num_fixed_draws=2, num_strata=5 * stratified_timesteps)
    for start in range(0, 60, 5):
        batch = policy.collate([stream[n] for n in range(start, start + 5)])
        online = adapter_off(policy)(policy.model, batch)
        assert torch.equal(online.chosen, batch["reference_chosen"])
        assert torch.equal(online.rejected, batch["reference_rejected"])


def test_more_fixed_draws_than_epochs_equal_fresh_draws() -> None:
    """Seven visits of each row, as the shapes recipe makes: 16 kept draws are the same run, 4 are not."""
    rows = [{"id": str(n)} for n in range(5)]
    fresh, sixteen, four = (PairStream(rows, seed=0, length=35, num_fixed_draws=k) for k in (0, 16, 4))
    assert [sixteen[n] for n in range(35)] == [fresh[n] for n in range(35)] != [four[n] for n in range(35)]


class Recorder(Line):
    """A policy that records its batches, and whether autocast is on."""

    modality = "image"

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.dtypes: set[Any] = set()

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        yield

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        return {"id": [row["id"] for row in rows]}

    def log_probs(self, model: Any, batch: Any) -> Any:
        self.batches.append(batch["id"])
        self.dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        values = torch.tensor([float(name) for name in batch["id"]])
        return LogProbs(values, -values, values, values, is_likelihood=False)


@pytest.mark.parametrize(
    ("precision", "tuning", "dtype"),
    [("fp32", "full", torch.float32), ("bf16", "full", torch.bfloat16), ("bf16", "lora", torch.float32)],
)
def test_references_are_precomputed_in_full_batches_and_the_precision_of_the_step(
    precision: str, tuning: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """It catches a last batch that is not filled up, a bucket's batch with other rows, and autocast where the step has none.

    Each of them changes the last bits of the log-probs, so that loss and reward are not 0 at the first step.
    """

    class Rows(list[dict[str, Any]]):
        buckets = (range(5), range(5, 7))

    policy, rows = Recorder(), Rows({"id": str(n)} for n in range(7))
    given = config("-", "-", tmp_path, batch_size=3, precision=precision, tuning=tuning)
    found = precompute_reference_log_probs(policy, PairStream(rows, seed=0, length=0, num_fixed_draws=2), given)  # type: ignore[arg-type]
    assert policy.batches == [["0", "1", "2"], ["3", "4", "0"], ["5", "6", "5"]] * 2 and policy.dtypes == {dtype}
    for number in range(7):
        assert found[number]["reference_chosen"].tolist() == [number, number]
        assert found[number]["reference_rejected"].tolist() == [-number, -number]


def test_trainer_arguments_are_those_of_the_config(tmp_path: Path) -> None:
    """It catches a setting that does not reach the optimizer, such as a learning rate of 0."""
    given = config(
        "-", "-", tmp_path, learning_rate=0.02, schedule="cosine", warmup_steps=7, max_grad_norm=0.3, weight_decay=0.04,
        accumulate=5, seed=6, optimizer="adafactor",
    )  # fmt: skip
    made = training_arguments(given)
    assert (made.learning_rate, made.lr_scheduler_type.value, made.get_warmup_steps(1000)) == (0.02, "cosine", 7)
    assert (made.max_grad_norm, made.weight_decay, made.optim.value) == (0.3, 0.04, "adafactor")
    assert (made.max_steps, made.per_device_train_batch_size, made.gradient_accumulation_steps, made.seed) == (
        6,
        3,
        5,
        6,
    )
