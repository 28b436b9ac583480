"""Numbers that were wrong without a word: shared ids, a bad batch in BCO's mean, NaN latents, rows evaluated twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.stable_diffusion import StableDiffusion
from dpo_mm.policies.families import load_policy
from dpo_mm.training import run
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import adapter_off
from dpo_mm.training.trainer import PreferenceTrainer
from tests.conftest import rows
from tests.contracts import tiny_vlms


def config(model: str, pairs: str, folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "log_every": 1, "eval_fraction": 0.0, "seed": 3, **changes}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(folder), **settings)


def test_rows_with_the_same_id_have_separate_probabilities(
    tiny_model: str, write_pairs: Callable[..., str], tmp_path: Path
) -> None:
    """Catches columns that are looked up by id."""
    shared = [{**row, "id": "same", "p_a": 0.6 + 0.1 * n, "preference": "a"} for n, row in enumerate(rows(3))]
    for n, row in enumerate(shared):
        row["prompt"] = f"prompt {n}"
    encoded = encode_splits(load_policy(tiny_model), config(tiny_model, write_pairs(shared), tmp_path)).rows
    assert [encoded[n]["probability"] for n in range(3)] == pytest.approx([0.6, 0.7, 0.8])


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the log-probs of the policy NaN in these steps, counted from 1."""
    real, calls = StableDiffusion.log_probs, [0]

    def log_probs(self: Any, model: Any, batch: Any) -> Any:
        found = real(self, model, batch)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] in steps:
                found = dataclasses.replace(found, chosen=found.chosen * math.nan)
        return found

    monkeypatch.setattr(StableDiffusion, "log_probs", log_probs)


def test_skipped_step_does_not_change_the_running_mean(
    monkeypatch: pytest.MonkeyPatch, tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    """Catches BCO's running mean staying NaN after one bad batch, and counting its rows."""
    poison(monkeypatch, {2})
    result = run.train(config(tiny_model, pairs, tmp_path, objective="bco_pair"))
    rewards = json.loads((tmp_path / "dpo_mm.json").read_text())["rewards"]
    assert math.isfinite(rewards["mean"]) and rewards["count"] == 3 * 2 * 2
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]


def test_run_without_a_finite_step_writes_no_adapter(
    monkeypatch: pytest.MonkeyPatch, tiny_model: str, pairs: str, tmp_path: Path
) -> None:
    poison(monkeypatch, {1, 2, 3, 4})
    with pytest.raises(FloatingPointError, match="none of the 4 steps had a finite gradient"):
        run.train(config(tiny_model, pairs, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_non_finite_latents_are_refused_with_their_row(
    monkeypatch: pytest.MonkeyPatch, tiny_model: str, write_pairs: Callable[..., str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))  # other tests encode the same rows
    real = StableDiffusion.encode_images

    def encode_images(self: Any, images: Any) -> Any:
        mean, std = real(self, images)
        return (mean.index_fill(0, torch.tensor([1]), math.nan), std) if len(images) > 1 else (mean, std)

    monkeypatch.setattr(StableDiffusion, "encode_images", encode_images)
    with pytest.raises(ValueError, match="row row-1: the latents of its chosen image are not finite"):
        encode_splits(load_policy(tiny_model), config(tiny_model, write_pairs(rows(4)), tmp_path))


def test_evaluation_counts_each_row_once(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Rows that fill up a batch have number -1, or a number that came before: neither counts."""
    settings = config(tiny_model, pairs, tmp_path)
    policy = load_policy(tiny_model)
    encoded = encode_splits(policy, settings).rows
    policy.prepare(settings)
    trainer = PreferenceTrainer(policy, settings, encoded, encoded)
    trainer._metrics["eval"] = [
        {"loss": torch.tensor([1.0, 2.0]), "number": torch.tensor([1, 0])},
        {"loss": torch.tensor([6.0, 50.0, 60.0]), "number": torch.tensor([2, -1, 0])},
    ]
    assert trainer._eval_averages() == {"loss": pytest.approx(3.0)}
    broken, empty = torch.tensor([1.0, math.nan]), torch.tensor([math.nan, 4.0])
    trainer._metrics["eval"] = [{"loss": broken, "rewards/margins_quartile1": empty, "number": torch.arange(2)}]
    means = trainer._eval_averages()
    assert math.isnan(means["loss"]), "a row without a finite loss counts"
    assert means["rewards/margins_quartile1"] == 4.0, "a row of another quartile does not"


def test_evaluation_stream_marks_padding_rows() -> None:
    class Rows:
        buckets = (range(3), range(3, 5))

        def __len__(self) -> int:
            return 5

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {"id": str(number)}

    stream = PairStream(Rows(), seed=0, length=12, num_fixed_draws=2, shuffle=False, batch_size=4)
    numbered = [(row["id"], row["visit"], row["number"] >= 0) for row in (stream[n] for n in range(12))]
    assert len({row for row in numbered if row[2]}) == 10 and [row[2] for row in numbered].count(False) == 2


def test_vision_tower_lora_trains_with_adapter_off(tmp_path: Path) -> None:
    """Catches features that the reference computed without gradient, which the policy then used: the tower stood still."""
    model = tiny_vlms.save("llava", tmp_path / "model")
    settings = config(model, "-", tmp_path, train_vision_tower=True, lora_rank=2)
    policy = load_policy(model, train_vision_tower=True)
    encoded = policy.encode(Dataset.from_list(tiny_vlms.rows("llava", (1, 1))))
    policy.prepare(settings)
    batch = policy.collate(encoded)
    adapter_off(policy)(policy.model, batch)
    log_probs = policy.log_probs(policy.model, batch)
    (log_probs.chosen - log_probs.rejected).sum().backward()
    tower = {
        name: p.grad
        for name, p in policy.model.named_parameters()
        if "vision" in name and "layers.0" in name and "lora_B" in name
    }
    assert tower and all(gradient is not None and gradient.abs().max() > 0 for gradient in tower.values())
