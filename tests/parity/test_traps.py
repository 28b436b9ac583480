"""Each trap that the peers fell into, and the test that would catch it in ours; those without another home stand here."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode_splits

TESTS = Path(__file__).parents[1]
TRAPS = {
    "TRL: bco_pair without a running mean": "parity/test_trl.py::test_their_bco_has_no_running_mean",
    "TRL: sigmoid ignores label label_smoothing": "parity/test_trl.py::test_their_sigmoid_ignores_label_smoothing",
    "TRL: discopop overflows": "parity/test_trl.py::test_their_discopop_overflows",
    "TRL: likelihoods averaged over the batch's tokens": "parity/test_trl.py::test_their_sft_is_a_mean_over_the_batchs_tokens",
    "ms-swift, LLaMA-Factory: LD-DPO on the policy alone": "parity/test_trl.py::test_their_length_desensitising_acts_on_policy_and_reference",
    "diffusers: no 1/2 for SD": "parity/test_diffusion_formulas.py::test_the_half_matters",
    "diffusers: an ipo that can't run": "unit/objectives/test_objectives.py::test_objective_matches_hand_arithmetic",
    "diffusers: ties are wins of the first image": "unit/data/test_schema.py::test_ties_never_become_wins",
    "diffusers: the ratio's sign in ORPO": "unit/objectives/test_objectives.py::test_objective_matches_hand_arithmetic",
    "Salesforce, diffusers: sides flipped independently": "parity/test_traps.py::test_one_picture_on_both_sides_is_a_tie",
    "DiffSynth: uniform noise": "unit/policies/diffusion/test_random_draws.py::test_sample_noise_is_gaussian_and_levels_are_uniform",
    "InPO, SmPO: one timestep a micro-batch": "parity/test_traps.py::test_each_pair_has_a_timestep_of_its_own",
    "VideoDPO: noise not shared within a pair": "parity/test_traps.py::test_one_picture_on_both_sides_is_a_tie",
    "invoke-training: mean before the sigmoid": "unit/objectives/test_objectives.py::test_objective_single_pair_equals_its_loss_in_the_batch",
    "LongCat: gradients zeroed within accumulation": "parity/test_traps.py::test_accumulated_halves_are_the_whole_batch",
    "SimpleTuner: automatic beta not in the checkpoint": "unit/training/test_auto_beta.py::test_a_measured_beta_is_said_kept_and_taken_up_again",
    "SimpleTuner: Flow-DPO on summed errors": "parity/test_diffusion_formulas.py::test_beta_in_the_authors_units",
    "raw v errors re-weigh time": "unit/training/test_auto_beta.py::test_weighting_epsilon_is_the_error_of_the_noise",
    "a save by the main process alone hangs": "reliability/test_processes.py::test_one_of_two_processes_asked_to_stop_stops_both_and_one_process_goes_on",
    "Diffusion-SDPO: one scale a micro-batch": "unit/objectives/test_objectives.py::test_sdpo_lambda_image_is_computed_per_pair",
    "half-precision errors drown the margin": "parity/test_traps.py::test_errors_of_a_half_precision_model_are_taken_in_float32",
    "one sample of the posterior kept for good": "unit/training/test_encoding.py::test_a_fresh_sample_at_each_visit_is_what_encoding_in_the_step_gives",
    "a mined loop dominates the margin": "unit/mining/test_mine_responses.py::test_a_loop_is_rejected_cut_and_left_open_with_its_reason",
}


def test_every_trap_has_its_test() -> None:
    assert len(TRAPS) == 23
    for trap, place in TRAPS.items():
        file, _, name = place.partition("::")
        names = {
            node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in names, trap


def config(model: str, pairs: str, out: Path, **more: Any) -> TrainConfig:
    given = {"steps": 2, "batch_size": 4, "log_every": 1, "eval_fraction": 0.0, "learning_rate": 1e-3, **more}
    return TrainConfig(model=model, pairs=pairs, output_dir=str(out), **given)


def prepared(model: str, pairs: str, out: Path, precision: str = "fp32") -> tuple[Any, list[Any]]:
    """A policy whose adapter has moved, and four encoded rows at their first visit."""
    policy = load_policy(model, precision=precision)
    given = config(model, pairs, out)
    rows = encode_splits(policy, given).rows
    policy.prepare(given)
    torch.manual_seed(0)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy, [{**rows[n], "visit": 0} for n in range(4)]


def test_one_picture_on_both_sides_is_a_tie(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """The same crop, posterior sample, noise and timestep on both sides, or the log-probs would differ."""
    policy, rows = prepared(tiny_model, pairs, tmp_path)
    twice = [{**row, **{f"rejected_{part}": row[f"chosen_{part}"] for part in ("mean", "std")}} for row in rows]
    for some, ties in ((twice, True), (rows, False)):
        said = policy.log_probs(policy.model, policy.collate(some))
        assert torch.equal(said.chosen, said.rejected) == ties


def test_each_pair_has_a_timestep_of_its_own(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    policy, rows = prepared(tiny_model, pairs, tmp_path)
    batch = policy.collate(rows)
    assert len(set(batch["timestep"].tolist())) == 4
    assert len({noise.sum().item() for noise in batch["noise"]}) == 4


def test_accumulated_halves_are_the_whole_batch(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """One step of plain gradient descent from 4 pairs, and from 2 + 2. Adam would hide a gradient of half the size."""
    moved = []
    for name, more in (("whole", {}), ("halves", {"batch_size": 2, "accumulate": 2})):
        given = config(tiny_model, pairs, tmp_path / name, steps=1, beta=50, max_grad_norm=0, **more)
        policy, trainer = _trainer(given)
        trainer.optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=1.0)
        trainer.train()
        moved.append(torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad]))
    start = _trainer(config(tiny_model, pairs, tmp_path / "start"))[0]
    before = torch.cat([p.detach().flatten() for p in start.model.parameters() if p.requires_grad])
    steps = [after - before for after in moved]
    assert steps[0].norm() > 1e-3
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()


def _trainer(given: TrainConfig) -> tuple[Any, Any]:
    from dpo_mm.training.trainer import PreferenceTrainer

    policy = load_policy(given.model)
    rows = encode_splits(policy, given).rows
    policy.free_encoders()
    policy.prepare(given)
    return policy, PreferenceTrainer(policy, given, rows)


def test_errors_of_a_half_precision_model_are_taken_in_float32(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """The network's own rounding is in policy and reference alike; what is compared has more than bfloat16's digits."""
    policy, rows = prepared(tiny_model, pairs, tmp_path, precision="bf16")
    batch = policy.collate(rows)
    with torch.autocast("cpu", torch.bfloat16):
        said = policy.log_probs(policy.model, batch)
        residual = policy.pair_errors(policy.model, batch).residual
    assert said.chosen.dtype == torch.float32 and residual.dtype == torch.float32
    assert not torch.equal(said.chosen, said.chosen.bfloat16().float())
    expected = -0.5 * residual[:4].double().square().flatten(1).mean(1)
    torch.testing.assert_close(said.chosen.double(), expected, rtol=1e-5, atol=0)
