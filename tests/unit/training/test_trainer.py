from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_image_rows
from dpo_mm.objectives import OBJECTIVES, LogProbs
from dpo_mm.policies.adapters import LORA_FILE
from dpo_mm.training.builders import build_loss
from dpo_mm.training.metrics import reward_metrics, split_by_noise_quartile
from dpo_mm.training.run import dry_run, train
from tests.conftest import rows


def config(model: str, pairs: str, out: str, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        model=model,
        pairs=pairs,
        output_dir=out,
        steps=6,
        batch_size=2,
        log_every=1,
        learning_rate=1e-3,
        eval_fraction=0.34,
    )
    return dataclasses.replace(plain, **changes)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / LORA_FILE)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_starts_at_ln_2_and_logs_what_is_watched(tiny_model: str, pairs: str, out: str) -> None:
    trained = train(config(tiny_model, pairs, out))
    first = trained.history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/accuracies"], first["rewards/margins"], first["errors/chosen"]) == (0.5, 0.0, 1.0)
    assert {"rewards/chosen", "rewards/rejected", "errors/rejected"} <= first.keys()
    last = trained.history[-1]
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= last.keys()
    quarters = [last[f"eval_rewards/margins_quartile{n}"] for n in (1, 2, 3, 4)]
    assert len(set(quarters)) == 4 and sum(quarters) / 4 == pytest.approx(last["eval_rewards/margins"])
    assert [entry["step"] for entry in trained.history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert json.loads((Path(out) / "dpo_mm.json").read_text())["steps"] == 6


def test_resuming_gives_the_same_bits(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """4 + resume to 9 equals 9, with accumulation, into a second visit of the rows."""
    whole = config(tiny_model, pairs, str(tmp_path / "whole"), steps=9, save_every=4, accumulate=2)
    unbroken = train(whole)
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"), steps=4)
    train(cut)
    resumed = train(dataclasses.replace(cut, steps=9, resume=True))
    assert same(weights(unbroken.folder), weights(resumed.folder))
    losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (unbroken, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 9


@pytest.mark.slow
def test_loader_processes_change_nothing(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    one = train(config(tiny_model, pairs, str(tmp_path / "one")))
    two = train(config(tiny_model, pairs, str(tmp_path / "two"), workers=2))
    assert same(weights(one.folder), weights(two.folder))


@pytest.mark.slow
def test_another_seed_changes_the_run(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    one, two = (train(config(tiny_model, pairs, str(tmp_path / str(s)), seed=s)) for s in (0, 1))
    assert not same(weights(one.folder), weights(two.folder))


def test_a_changed_recipe_is_not_resumed(tiny_model: str, pairs: str, out: str) -> None:
    train(config(tiny_model, pairs, out, save_every=3))
    with pytest.raises(ValueError, match=r"another recipe \(beta: 5000.0 -> 100; seed: 0 -> 1\)"):
        train(config(tiny_model, pairs, out, beta=100, seed=1, resume=True))
    with pytest.raises(ValueError, match=r"another recipe \(pairs_per_step: 2 -> 4\)"):
        train(config(tiny_model, pairs, out, batch_size=4, resume=True))


def test_changed_pairs_are_not_resumed(tiny_model: str, write_pairs: Callable[..., str], out: str) -> None:
    """The same file name with other rows in it: one label turned."""
    some = rows(6)
    path = write_pairs(some)
    train(config(tiny_model, path, out, save_every=3, steps=3))
    some[2]["preference"] = "b"
    make_image_rows(some).to_parquet(path)
    with pytest.raises(ValueError, match=r"pairs.parquet has changed since .*checkpoint-3"):
        train(config(tiny_model, path, out, resume=True))


@pytest.mark.slow
def test_a_run_goes_on_with_another_batch_of_the_same_pairs_a_step(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Four pairs per step as one batch, then as two: the same pairs and noise, so the same losses except for rounding.

    With beta 500 the rounding of one error moves a loss by 4e-6; with the default of 5,000 by 4e-5.
    """
    whole = config(tiny_model, pairs, str(tmp_path / "whole"), batch_size=4, stratified_timesteps=True, beta=500.0)
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"), steps=3, save_every=3)
    train(cut)
    resumed = train(dataclasses.replace(cut, steps=6, batch_size=2, accumulate=2, resume=True))
    losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (train(whole), resumed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 6


def test_precomputed_references_equal_those_asked_online(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    online = train(config(tiny_model, pairs, str(tmp_path / "online"), fixed_draws_per_row=2))
    kept = train(config(tiny_model, pairs, str(tmp_path / "kept"), fixed_draws_per_row=2, reference="precomputed"))
    losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (online, kept)]
    assert losses[0] == losses[1] and same(weights(online.folder), weights(kept.folder))
    watched = [{k: v for k, v in run.history[-1].items() if k.startswith("eval_")} for run in (online, kept)]
    assert watched[0] == watched[1] and "eval_rewards/accuracies_quartile4" in watched[0]


def test_fixed_draws_repeat_and_fresh_ones_do_not() -> None:
    from dpo_mm.training.pair_stream import PairStream

    rows = [{"id": str(n)} for n in range(3)]
    fixed = PairStream(rows, seed=0, length=12, num_fixed_draws=2)
    assert [fixed[i]["visit"] for i in range(12)] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    fresh = PairStream(rows, seed=0, length=12)
    assert [fresh[i]["visit"] for i in range(12)] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert all(sorted(fresh[i]["id"] for i in range(v * 3, v * 3 + 3)) == ["0", "1", "2"] for v in range(4))
    assert [fresh[i]["id"] for i in range(12)] != [PairStream(rows, seed=5, length=12)[i]["id"] for i in range(12)]


NOT_YET = {"orpo", "image_conditional", "symmetric_image", "tdpo"}
"""Objectives that want likelihoods, or a forward that the trainer does not make; each is refused."""
IMAGE_OBJECTIVES = sorted(set(OBJECTIVES) - NOT_YET - {"sigmoid"})
SETTINGS = {"linear": {"floor": 0.1}}


@pytest.mark.slow
@pytest.mark.parametrize("objective", IMAGE_OBJECTIVES)
def test_every_objective_trains_images(objective: str, tiny_model: str, pairs: str, out: str) -> None:
    trained = train(
        config(
            tiny_model,
            pairs,
            out,
            objective=objective,
            objective_kwargs=SETTINGS.get(objective, {}),
            steps=2,
            eval_fraction=0,
        )
    )
    assert all(math.isfinite(entry["loss"]) for entry in trained.history if "loss" in entry)
    assert any(tensor.abs().sum() > 0 for name, tensor in weights(out).items() if "lora_B" in name or "lora.up" in name)


@pytest.mark.parametrize("objective", sorted(NOT_YET))
def test_objectives_that_cannot_train_images_are_refused(objective: str, tiny_model: str, pairs: str, out: str) -> None:
    with pytest.raises(ValueError, match=objective):
        train(config(tiny_model, pairs, out, objective=objective))
    assert not Path(out).exists()


def test_full_fine_tuning_keeps_a_frozen_reference(tiny_model: str, pairs: str, out: str) -> None:
    trained = train(config(tiny_model, pairs, out, tuning="full", learning_rate=1e-4))
    assert trained.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trained.history[5]["loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert (Path(out) / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_bf16_starts_at_ln_2(tiny_model: str, pairs: str, out: str) -> None:
    trained = train(config(tiny_model, pairs, out, precision="bf16", steps=2))
    assert trained.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}


def test_measures_are_signed_and_ties_count_half() -> None:
    one = torch.ones(3)
    reference = LogProbs(-one, -one, one, one, is_likelihood=False)
    policy = LogProbs(torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -1.0]), one, one, is_likelihood=False)
    found = reward_metrics(policy, reference, beta=2.0)
    assert found["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert found["rewards/margins"].tolist() == [2.0, 0.0, -2.0]
    assert found["rewards/chosen"].tolist() == [1.0, 0.0, -2.0]
    assert found["errors/chosen"].tolist() == [0.5, 1.0, 2.0]
    assert found["rewards/absolute_margins"].tolist() == [2.0, 0.0, 2.0]
    assert "errors/chosen" not in reward_metrics(dataclasses.replace(policy, is_likelihood=True), reference, beta=2.0)


def test_quarters_of_the_schedule_hold_their_own_pairs() -> None:
    """Mutation that it catches: quarters of the batch, or of the levels that happen to be there."""
    found = {
        "rewards/accuracies": torch.tensor([1.0, 0.0, 0.5, 1.0]),
        "rewards/margins": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    split = split_by_noise_quartile(found, torch.tensor([0.0, 0.249, 0.25, 0.99]))
    means = {name: value.nanmean().item() for name, value in split.items()}
    assert [means[f"rewards/margins_quartile{n}"] for n in (1, 2, 4)] == [1.5, 3.0, 4.0]
    assert [means[f"rewards/accuracies_quartile{n}"] for n in (1, 2, 4)] == [0.5, 0.5, 1.0]
    assert math.isnan(means["rewards/margins_quartile3"]) and len(split) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "beta must be above 0"),
        ({"objective": "sigmod"}, "did you mean 'sigmoid'"),
        ({"objective_kwargs": {"label_smoothing": 0.7}}, "label_smoothing must be in"),
        ({"objective_kwargs": {"smothing": 0.1}}, "smothing: not a setting of sigmoid"),
        ({"reference": "adapter"}, "did you mean 'adapter_off'"),
        ({"reference": "precomputed"}, "fixed_draws_per_row of at least 1"),
        ({"reference": "adapter_off", "tuning": "full"}, "needs a LoRA"),
        ({"tuning": "half"}, "Expected 'lora' or 'full'"),
        ({"precision": "fp8"}, "expected"),
        ({"lora_targets": ("nowhere",)}, "lora_targets"),
        ({"undecodable_images": "ignore"}, "expected 'raise' or 'drop'"),
        ({"pairs": "nowhere.parquet"}, "no such file"),
        ({"timestep_sampling": "logit-normal"}, "did you mean 'logit_normal'"),
        ({"timestep_range": (0.5, 0.2)}, "expected 0 <= low < high <= 1"),
        ({"antithetic_noise": True, "batch_size": 3}, "even batch_size"),
        ({"antithetic_noise": True, "fixed_draws_per_row": 4}, "no fixed_draws_per_row"),
    ],
)
def test_wrong_settings_name_themselves(
    changes: dict[str, Any], message: str, tiny_model: str, pairs: str, out: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config(tiny_model, pairs, out), **changes))


def test_the_plan_says_beta_in_every_convention(tiny_model: str, pairs: str, out: str) -> None:
    said = dry_run(config(tiny_model, pairs, out))
    assert (
        "5000 in the Diffusion-DPO authors' convention = 2500 in diffusers' script = 4.88 on summed"
        in said["effective beta"]
    )
    assert "mean over 1,024 latent elements" in said["reduction"]
    assert "8 to train on" in said["pairs"]
    assert not Path(out).exists()


def test_the_loss_of_a_mixture_is_its_sum() -> None:
    one = torch.ones(2)
    policy = LogProbs(-one, -2 * one, one, one, is_likelihood=False)
    reference = LogProbs(-1.5 * one, -1.5 * one, one, one, is_likelihood=False)
    mixed = TrainConfig("-", "-", "-", objective={"sigmoid": 0.8, "hinge": 0.2}, beta=0.5, sft_weight=2.0)
    expected = 0.8 * math.log1p(math.exp(-0.5)) + 0.2 * 0.5 + 2.0 * 2.0
    assert build_loss(mixed, modality="image")(policy, reference, {}).tolist() == pytest.approx([expected] * 2)
