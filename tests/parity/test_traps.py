"""Mistakes in peer projects, each with the test that would catch it here. Tests with no better place are in this file."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion.denoising_errors import pair_errors
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode_splits

TESTS = Path(__file__).parents[1]
TRAPS = {
    "TRL: bco_pair without a running mean": "parity/test_trl.py::test_trl_bco_has_no_running_mean",
    "TRL: sigmoid ignores label_smoothing": "parity/test_trl.py::test_trl_sigmoid_ignores_label_smoothing",
    "TRL: discopop overflows": "parity/test_trl.py::test_trl_discopop_overflows",
    "TRL: likelihoods averaged over the batch's tokens": "parity/test_trl.py::test_trl_sft_is_a_mean_over_the_batchs_tokens",
    "ms-swift, LLaMA-Factory: LD-DPO only on the policy": "parity/test_trl.py::test_trl_ld_dpo_applies_to_policy_and_reference",
    "diffusers: no 1/2 for SD": "parity/test_diffusion_formulas.py::test_factor_half_changes_the_loss",
    "diffusers: an ipo that cannot run": "unit/objectives/test_objectives.py::test_objective_matches_hand_arithmetic",
    "diffusers: ties are wins of the first image": "unit/data/test_schema.py::test_ties_never_become_wins",
    "diffusers: the ratio's sign in ORPO": "unit/objectives/test_objectives.py::test_objective_matches_hand_arithmetic",
    "Salesforce, diffusers: chosen and rejected flipped independently": "parity/test_traps.py::test_same_image_as_chosen_and_rejected_gives_equal_log_probs",
    "DiffSynth: uniform noise": "unit/policies/diffusion/test_random_draws.py::test_sample_noise_is_gaussian_and_levels_are_uniform",
    "InPO, SmPO: one timestep per micro-batch": "parity/test_traps.py::test_each_pair_samples_a_separate_timestep",
    "VideoDPO: noise not shared within a pair": "parity/test_traps.py::test_same_image_as_chosen_and_rejected_gives_equal_log_probs",
    "invoke-training: mean before the sigmoid": "unit/objectives/test_objectives.py::test_objective_single_pair_equals_its_loss_in_the_batch",
    "LongCat: gradients zeroed within accumulation": "parity/test_traps.py::test_two_accumulated_halves_give_the_step_of_the_whole_batch",
    "SimpleTuner: automatic beta not in the checkpoint": "unit/training/test_auto_beta.py::test_auto_beta_is_logged_saved_and_used_on_resume",
    "SimpleTuner: Flow-DPO on summed errors": "parity/test_diffusion_formulas.py::test_beta_5000_in_sum_reduced_units",
    "raw v errors re-weight the timesteps": "unit/training/test_auto_beta.py::test_epsilon_weighting_equals_the_error_of_the_noise",
    "a save by only the main process hangs": "reliability/test_processes.py::test_sigterm_to_one_of_two_processes_stops_both_and_one_process_resumes",
    "Diffusion-SDPO: one scale per micro-batch": "unit/objectives/test_objectives.py::test_sdpo_lambda_image_is_computed_per_pair",
    "rounding of half-precision errors hides the delta": "parity/test_traps.py::test_errors_of_a_half_precision_model_are_computed_in_float32",
    "one posterior sample cached for all epochs": "unit/training/test_encoding.py::test_fresh_latent_sample_equals_encoding_in_the_step",
    "a mined repetition loop dominates the delta": "unit/mining/test_mine_responses.py::test_loop_is_rejected_truncated_without_end_of_turn_and_with_reason",
}


def test_every_trap_has_its_test() -> None:
    assert len(TRAPS) == 23
    for trap, path in TRAPS.items():
        file, _, name = path.partition("::")
        test_names = {
            node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in test_names, trap


def config(model: str, pairs: str, out: Path, **more: Any) -> TrainConfig:
    settings = {"steps": 2, "batch_size": 4, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(out), **settings)


def prepare_policy_and_rows(model: str, pairs: str, out: Path, precision: str = "fp32") -> tuple[Any, list[Any]]:
    """A policy whose adapter changes the model, and four encoded rows in their first epoch."""
    policy = load_policy(model, precision=precision)
    train_config = config(model, pairs, out)
    rows = encode_splits(policy, train_config).rows
    policy.prepare(train_config)
    torch.manual_seed(0)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy, [{**rows[n], "visit": 0} for n in range(4)]


def test_same_image_as_chosen_and_rejected_gives_equal_log_probs(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Chosen and rejected share crop, posterior sample, noise and timestep. Otherwise the log-probs would differ."""
    policy, rows = prepare_policy_and_rows(tiny_model, pairs, tmp_path)
    same_image = [{**row, **{f"rejected_{part}": row[f"chosen_{part}"] for part in ("mean", "std")}} for row in rows]
    for examples, equal in ((same_image, True), (rows, False)):
        log_probs = policy.log_probs(policy.model, policy.collate(examples))
        assert torch.equal(log_probs.chosen, log_probs.rejected) == equal


def test_each_pair_samples_a_separate_timestep(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    policy, rows = prepare_policy_and_rows(tiny_model, pairs, tmp_path)
    batch = policy.collate(rows)
    assert len(set(batch["timestep"].tolist())) == 4
    assert len({noise.sum().item() for noise in batch["noise"]}) == 4


def test_two_accumulated_halves_give_the_step_of_the_whole_batch(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Compare one step of plain gradient descent on 4 pairs and on 2 + 2. Adam would hide a gradient of half the size."""
    weights_after = []
    for name, more in (("whole", {}), ("halves", {"batch_size": 2, "accumulate": 2})):
        train_config = config(tiny_model, pairs, tmp_path / name, steps=1, beta=50, max_grad_norm=0, **more)
        policy, trainer = _trainer(train_config)
        trainer.optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=1.0)
        trainer.train()
        weights_after.append(torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad]))
    initial_policy = _trainer(config(tiny_model, pairs, tmp_path / "start"))[0]
    before = torch.cat([p.detach().flatten() for p in initial_policy.model.parameters() if p.requires_grad])
    steps = [after - before for after in weights_after]
    assert steps[0].norm() > 1e-3
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()


def _trainer(train_config: TrainConfig) -> tuple[Any, Any]:
    from dpo_mm.training.trainer import PreferenceTrainer

    policy = load_policy(train_config.model)
    rows = encode_splits(policy, train_config).rows
    policy.free_encoders()
    policy.prepare(train_config)
    return policy, PreferenceTrainer(policy, train_config, rows)


def test_errors_of_a_half_precision_model_are_computed_in_float32(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """The network's rounding is the same in policy and reference. The errors have more digits than bfloat16."""
    policy, rows = prepare_policy_and_rows(tiny_model, pairs, tmp_path, precision="bf16")
    batch = policy.collate(rows)
    log_probs = policy.log_probs(policy.model, batch)
    residual = pair_errors(policy, policy.model, batch).residual
    assert log_probs.chosen.dtype == torch.float32 and residual.dtype == torch.float32
    assert not torch.equal(log_probs.chosen, log_probs.chosen.bfloat16().float())
    expected = -0.5 * residual[:4].double().square().flatten(1).mean(1)
    torch.testing.assert_close(log_probs.chosen.double(), expected, rtol=1e-5, atol=0)
