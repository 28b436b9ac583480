"""Whole runs on a tiny image generator: losses, metrics, resuming, references, settings that are refused."""

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
from dpo_mm.policies.diffusion.denoising_errors import DenoisingErrors, pair_errors
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import build_loss
from dpo_mm.training.checkpoints import check_same_recipe
from dpo_mm.training.encoding import encode_splits
from dpo_mm.training.metrics import reward_metrics, split_by_noise_quartile
from dpo_mm.training.pair_stream import PairStream, eval_stream, training_stream
from dpo_mm.training.run import TrainResult, dry_run, train
from dpo_mm.training.trainer import PreferenceTrainer
from tests.conftest import rows


def config(model: str, pairs: str, out: str, **changes: Any) -> TrainConfig:
    default = TrainConfig(
        model=model,
        pairs=pairs,
        output_dir=out,
        steps=6,
        batch_size=2,
        log_every=1,
        learning_rate=1e-3,
        eval_fraction=0.0,
    )
    return dataclasses.replace(default, **changes)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / LORA_FILE)


def first_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that differs or is in one of them only, or None if all are equal bit for bit."""
    names = sorted(one.keys() | other.keys())
    return next((n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])), None)


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.history if "loss" in entry]


def test_run_starts_at_ln_2_and_logs_train_and_eval_metrics(tiny_model: str, pairs: str, out: str) -> None:
    result = train(config(tiny_model, pairs, out, eval_fraction=0.34))
    first = result.history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/accuracies"], first["rewards/margins"], first["errors/chosen"]) == (0.5, 0.0, 1.0)
    assert {"rewards/chosen", "rewards/rejected", "errors/rejected"} <= first.keys()
    last = result.history[-1]
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= last.keys()
    quartiles = [last[f"eval_rewards/margins_quartile{n}"] for n in (1, 2, 3, 4)]
    assert len(set(quartiles)) == 4 and sum(quartiles) / 4 == pytest.approx(last["eval_rewards/margins"])
    assert [entry["step"] for entry in result.history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert json.loads((Path(out) / "dpo_mm.json").read_text())["steps"] == 6
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path(out).iterdir() if path.is_file()}
    assert LORA_FILE in modes and set(modes.values()) == {oct(Path(out).stat().st_mode & 0o666)}


def test_log_history_has_the_mean_log_probs_of_the_policy_for_train_and_eval(
    tiny_model: str, pairs: str, out: str
) -> None:
    """Compute them from the weights of the checkpoints: those of step 2 after step 1, those of eval at the end.

    Mutations that it catches: log-probs of the reference, swapped sides, whole errors instead of half, a sum for the mean.
    """
    settings = config(
        tiny_model, pairs, out, steps=2, save_every=1, learning_rate=3e-2, schedule="constant", eval_fraction=0.34
    )
    history = train(settings).history
    policy = load_policy(tiny_model)
    splits = encode_splits(policy, settings)
    policy.prepare(settings)
    train_pairs = training_stream(settings, splits.rows, 1)
    eval_pairs = eval_stream(splits.eval_rows, settings, modality="image")

    def mean_log_probs(stream: PairStream, indices: range) -> tuple[float, float]:
        with torch.no_grad():
            log_probs = policy.log_probs(policy.model, policy.collate([stream[n] for n in indices]))
        return log_probs.chosen.mean().item(), log_probs.rejected.mean().item()

    base = mean_log_probs(train_pairs, range(2, 4))
    policy.load_weights(Path(out) / "checkpoint-1")
    expected = mean_log_probs(train_pairs, range(2, 4))
    logged = next(entry for entry in history if entry["step"] == 2 and "loss" in entry)
    assert (logged["logps/chosen"], logged["logps/rejected"]) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(base, rel=1e-4)
    base = mean_log_probs(eval_pairs, range(len(eval_pairs)))
    policy.load_weights(Path(out))
    expected = mean_log_probs(eval_pairs, range(len(eval_pairs)))
    assert (history[-1]["eval_logps/chosen"], history[-1]["eval_logps/rejected"]) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(base, rel=1e-4)


def test_sdpo_scales_the_rejected_gradient_by_the_residual_of_the_policy(tiny_model: str, pairs: str, out: str) -> None:
    """Policy and reference differ. The gradient of the loss has the scale of `pair_errors`, not of the reference's.

        lambda = clip((1 - slack) |g_w|^2 / <g_l, g_w>, 0, 1),  g = prediction - target of the policy
        d loss / d log p_w = -beta sigmoid(-beta delta) / pairs,  d loss / d log p_l = lambda beta sigmoid(-beta delta) / pairs

    Mutations that it catches: a scale from the reference's residual. Or the last residual is stored in an attribute, and the
    reference runs after the policy.
    """
    beta, slack, num_pairs = 10.0, 0.6, 6
    settings = config(tiny_model, pairs, out, objective="sdpo", objective_kwargs={"slack": slack}, beta=beta)
    policy = load_policy(tiny_model)
    rows = encode_splits(policy, settings).rows
    policy.prepare(settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    stream = training_stream(settings, rows, 1)
    batch = policy.collate([stream[n] for n in range(num_pairs)])

    def scale_of(errors: DenoisingErrors) -> torch.Tensor:
        chosen, rejected = errors.residual.flatten(1).chunk(2)
        return ((1 - slack) * (chosen * chosen).sum(1) / (chosen * rejected).sum(1)).clamp(0, 1)

    with torch.no_grad():
        errors = pair_errors(policy, policy.model, batch)
        with policy.adapter_off():
            reference_errors = pair_errors(policy, policy.model, batch)
    scale, reference_scale = scale_of(errors), scale_of(reference_errors)
    assert (scale - reference_scale).abs().min() > 1e-3 and scale.min() > 0 and scale.max() < 1

    trainer, log_probs = PreferenceTrainer(policy, settings, rows), []
    objective = trainer.objective

    def record_log_probs(policy_logps: LogProbs, *inputs: Any) -> torch.Tensor:
        log_probs.append(policy_logps)
        policy_logps.chosen.retain_grad()
        policy_logps.rejected.retain_grad()
        return objective(policy_logps, *inputs)

    trainer.objective = record_log_probs
    trainer.compute_loss(policy.model, batch).backward()
    chosen, rejected = (errors.mean - reference_errors.mean).chunk(2)
    push = beta * torch.sigmoid(-beta * -0.5 * (chosen - rejected)) / num_pairs
    torch.testing.assert_close(log_probs[0].chosen.grad, -push, rtol=1e-4, atol=0)
    torch.testing.assert_close(log_probs[0].rejected.grad, scale * push, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_resumed_run_gives_the_same_bits(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """4 steps, then resumed to 9, equal 9 steps, with accumulation, into the second epoch of the rows."""
    whole_config = config(
        tiny_model, pairs, str(tmp_path / "whole"), steps=9, save_every=4, accumulate=2, eval_fraction=0.34
    )
    whole = train(whole_config)
    cut_config = dataclasses.replace(whole_config, output_dir=str(tmp_path / "cut"), steps=4)
    train(cut_config)
    resumed = train(dataclasses.replace(cut_config, steps=9, resume=True))
    assert first_difference(weights(whole.folder), weights(resumed.folder)) is None
    assert losses(whole) == losses(resumed) and len(losses(whole)) == 9


@pytest.mark.slow
def test_run_with_loader_processes_gives_the_same_bits(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    without = train(config(tiny_model, pairs, str(tmp_path / "without")))
    two = train(config(tiny_model, pairs, str(tmp_path / "two"), workers=2))
    assert first_difference(weights(without.folder), weights(two.folder)) is None


@pytest.mark.slow
def test_run_with_another_seed_gives_other_weights(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    one, two = (train(config(tiny_model, pairs, str(tmp_path / str(s)), seed=s)) for s in (0, 1))
    assert first_difference(weights(one.folder), weights(two.folder)) is not None


def test_resume_with_a_changed_recipe_names_the_changes(tiny_model: str, pairs: str, out: str) -> None:
    train(config(tiny_model, pairs, out, save_every=3))
    with pytest.raises(ValueError, match=r"another recipe \(beta: 5000.0 -> 100; seed: 0 -> 1\)"):
        train(config(tiny_model, pairs, out, beta=100, seed=1, resume=True))
    with pytest.raises(ValueError, match=r"another recipe \(pairs_per_step: 2 -> 4\)"):
        train(config(tiny_model, pairs, out, batch_size=4, resume=True))
    record = min(Path(out).glob("checkpoint-*/dpo_mm.json"))
    saved = json.loads(record.read_text())
    del saved["proportion_empty_prompts"]  # as if an earlier version wrote it
    record.write_text(json.dumps(saved))
    check_same_recipe(record.parent, config(tiny_model, pairs, out), pairs_per_step=2)


def test_resume_with_changed_pairs_is_refused(tiny_model: str, write_pairs: Callable[..., str], out: str) -> None:
    """The same file name with one label changed."""
    pair_rows = rows(6)
    path = write_pairs(pair_rows)
    train(config(tiny_model, path, out, save_every=3, steps=3))
    pair_rows[2]["preference"] = "b"
    make_image_rows(pair_rows).to_parquet(path)
    with pytest.raises(ValueError, match=r"pairs.parquet has changed since .*checkpoint-3"):
        train(config(tiny_model, path, out, resume=True))


@pytest.mark.slow
def test_resume_allows_new_batch_size_if_pairs_per_step_match(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """4 pairs per step as one batch, then as two: the same pairs and noise, so the same losses except for rounding.

    With beta 500 the rounding of one error moves a loss by 4e-6; with the default of 5,000 by 4e-5.
    """
    whole_config = config(
        tiny_model, pairs, str(tmp_path / "whole"), batch_size=4, stratified_timesteps=True, beta=500.0
    )
    cut_config = dataclasses.replace(whole_config, output_dir=str(tmp_path / "cut"), steps=3, save_every=3)
    train(cut_config)
    resumed = train(dataclasses.replace(cut_config, steps=6, batch_size=2, accumulate=2, resume=True))
    assert losses(train(whole_config)) == pytest.approx(losses(resumed), abs=1e-4) and len(losses(resumed)) == 6


@pytest.mark.slow
def test_precomputed_reference_gives_the_same_run_as_online(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    online, precomputed = (
        train(
            config(
                tiny_model,
                pairs,
                str(tmp_path / reference),
                fixed_draws_per_row=2,
                reference=reference,
                eval_fraction=0.34,
            )
        )
        for reference in ("auto", "precomputed")
    )
    assert losses(online) == losses(precomputed)
    assert first_difference(weights(online.folder), weights(precomputed.folder)) is None
    evals = [{k: v for k, v in run.history[-1].items() if k.startswith("eval_")} for run in (online, precomputed)]
    assert evals[0] == evals[1] and "eval_rewards/accuracies_quartile4" in evals[0]


def test_fixed_draws_repeat_after_k_epochs_and_fresh_draws_do_not() -> None:
    ids = [{"id": str(n)} for n in range(3)]
    fixed = PairStream(ids, seed=0, length=12, num_fixed_draws=2)
    assert [fixed[i]["visit"] for i in range(12)] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    fresh = PairStream(ids, seed=0, length=12)
    assert [fresh[i]["visit"] for i in range(12)] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert all(sorted(fresh[i]["id"] for i in range(v * 3, v * 3 + 3)) == ["0", "1", "2"] for v in range(4))
    assert [fresh[i]["id"] for i in range(12)] != [PairStream(ids, seed=5, length=12)[i]["id"] for i in range(12)]


UNSUPPORTED = {"orpo", "image_conditional", "symmetric_image", "tdpo"}
"""Objectives that need likelihoods, or a forward pass that the trainer does not run. Each is refused."""
IMAGE_OBJECTIVES = sorted(set(OBJECTIVES) - UNSUPPORTED - {"sigmoid"})
SETTINGS = {"linear": {"floor": 0.1}}


@pytest.mark.slow
@pytest.mark.parametrize("objective", IMAGE_OBJECTIVES)
def test_objective_trains_an_image_generator(objective: str, tiny_model: str, pairs: str, out: str) -> None:
    result = train(
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
    assert all(map(math.isfinite, losses(result)))
    assert any(tensor.abs().sum() > 0 for name, tensor in weights(out).items() if "lora_B" in name or "lora.up" in name)


@pytest.mark.parametrize("objective", sorted(UNSUPPORTED))
def test_objective_without_image_support_is_refused(objective: str, tiny_model: str, pairs: str, out: str) -> None:
    with pytest.raises(ValueError, match=objective):
        train(config(tiny_model, pairs, out, objective=objective))
    assert not Path(out).exists()


@pytest.mark.slow
def test_full_fine_tuning_starts_at_its_frozen_copy(tiny_model: str, pairs: str, out: str) -> None:
    result = train(config(tiny_model, pairs, out, tuning="full", learning_rate=1e-4))
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.history[5]["loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert (Path(out) / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_bf16_run_starts_at_ln_2_and_saves_float32_weights(tiny_model: str, pairs: str, out: str) -> None:
    result = train(config(tiny_model, pairs, out, precision="bf16", steps=2))
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}


def test_reward_metrics_are_signed_and_count_a_tie_as_half() -> None:
    one = torch.ones(3)
    reference = LogProbs(-one, -one, one, one, is_likelihood=False)
    policy = LogProbs(torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -1.0]), one, one, is_likelihood=False)
    metrics = reward_metrics(policy, reference, beta=2.0)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert metrics["rewards/margins"].tolist() == [2.0, 0.0, -2.0]
    assert metrics["rewards/chosen"].tolist() == [1.0, 0.0, -2.0]
    assert metrics["errors/chosen"].tolist() == [0.5, 1.0, 2.0]
    assert metrics["rewards/absolute_margins"].tolist() == [2.0, 0.0, 2.0]
    assert "errors/chosen" not in reward_metrics(dataclasses.replace(policy, is_likelihood=True), reference, beta=2.0)


def test_split_by_noise_quartile_uses_quartiles_of_the_schedule() -> None:
    """Mutations that it catches: quarters of the batch, or quartiles of the batch's noise levels."""
    metrics = {
        "rewards/accuracies": torch.tensor([1.0, 0.0, 0.5, 1.0]),
        "rewards/margins": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    split = split_by_noise_quartile(metrics, torch.tensor([0.0, 0.249, 0.25, 0.99]))
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
        ({"precision": "fp8"}, "expected fp32, bf16 or fp16"),
        ({"lora_targets": ("nowhere",)}, "lora_targets"),
        ({"undecodable_images": "ignore"}, "expected 'raise' or 'drop'"),
        ({"pairs": "nowhere.parquet"}, "no such file"),
        ({"timestep_sampling": "logit-normal"}, "did you mean 'logit_normal'"),
        ({"timestep_range": (0.5, 0.2)}, "expected 0 <= low < high <= 1"),
        ({"antithetic_noise": True, "batch_size": 3}, "even batch_size"),
        ({"antithetic_noise": True, "fixed_draws_per_row": 4}, "no fixed_draws_per_row"),
    ],
)
def test_invalid_setting_is_named_in_the_error(
    changes: dict[str, Any], message: str, tiny_model: str, pairs: str, out: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config(tiny_model, pairs, out), **changes))


def test_dry_run_prints_beta_in_every_convention(tiny_model: str, pairs: str, out: str) -> None:
    summary = dry_run(config(tiny_model, pairs, out, eval_fraction=0.34))
    assert (
        "5000 in the Diffusion-DPO authors' convention = 2500 in diffusers' script = 4.88 on summed"
        in summary["effective beta"]
    )
    assert "mean over 1,024 latent elements" in summary["reduction"]
    assert "8 to train on" in summary["pairs"]
    assert not Path(out).exists()


def test_loss_of_a_mixture_is_the_weighted_sum() -> None:
    one = torch.ones(2)
    policy = LogProbs(-one, -2 * one, one, one, is_likelihood=False)
    reference = LogProbs(-1.5 * one, -1.5 * one, one, one, is_likelihood=False)
    mixed = TrainConfig("-", "-", "-", objective={"sigmoid": 0.8, "hinge": 0.2}, beta=0.5, sft_weight=2.0)
    expected = 0.8 * math.log1p(math.exp(-0.5)) + 0.2 * 0.5 + 2.0 * 2.0
    assert build_loss(mixed, modality="image")(policy, reference, {}).tolist() == pytest.approx([expected] * 2)
