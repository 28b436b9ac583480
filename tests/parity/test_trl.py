"""Compare our objectives with TRL's trainers in float32: values to 1e-5, gradients to 1e-4.

TRL's known deviations are tested too.

Mutations that it catches, here and in TRL's next release: a sign, a factor 1/2, swapped chosen and rejected, an unsorted
quantile, a changed z.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL comes with the extra `bench`")

import torch

from dpo_mm import objectives
from dpo_mm.objectives import LogProbs, log_ratios
from tests.parity.table import PAGE, page_with_tables
from tests.parity.trl_peer import (
    PAIRS,
    Comparison,
    Ours,
    Peer,
    compare,
    comparisons,
    plain,
    token_mean_sft,
    trl_cpo,
    trl_dpo,
    trl_kto,
    trl_orpo,
)

VALUE, GRADIENT = 1e-5, 1e-4
TABLE = Path(__file__).parents[2] / "docs" / "benchmarks" / "parity.json"


@functools.cache
def peer() -> Peer:
    return Peer()


@functools.cache
def ours() -> Ours:
    return peer().ours()[0]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda c: f"{c.objective} = {c.peer}")
def test_objective_equals_trls(comparison: Comparison) -> None:
    difference = compare(peer(), comparison)
    assert difference.value <= VALUE
    assert difference.gradient <= GRADIENT


def test_every_loss_type_of_trl_is_compared() -> None:
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_dpo("no such loss")(peer())
    theirs = set(re.findall(r"'(\w+)'", str(error.value).split("one of")[1]))
    compared = {c.peer.removeprefix("DPOTrainer ").split(",")[0] for c in comparisons()}
    assert len(theirs) == 15 and theirs <= compared
    assert len(comparisons()) == 60


def test_batch_distinguishes_the_objectives() -> None:
    """A weaker batch would hide errors.

    Sorting must change the order, z must be above 0, log-ratios must have both signs, and lengths must differ.
    """
    policy, reference = ours().policy, ours().reference
    chosen, rejected = log_ratios(policy, reference)
    assert chosen.argsort().tolist() != rejected.argsort().tolist()
    order, before = ((side.chosen - side.rejected).argsort().tolist() for side in (policy, reference))
    assert order != before
    assert ours().z > 0.05
    assert (rejected < 0).any() and (rejected > 0).any() and (chosen - rejected < 0).any()
    assert (policy.num_tokens_chosen > policy.num_tokens_rejected).any() and (
        policy.num_tokens_chosen < policy.num_tokens_rejected
    ).any()


# Deviations of TRL


def test_trl_sigmoid_ignores_label_smoothing() -> None:
    """In TRL, cDPO is available only as `aot` on one pair, for which sorting changes nothing."""
    theirs = [trl_dpo("sigmoid", label_smoothing=e)(peer()).item() for e in (0.0, 0.3)]
    assert theirs[0] == theirs[1]
    assert abs(plain("sigmoid", label_smoothing=0.3)(ours()).item() - theirs[1]) > 1e-3
    for n, pair in enumerate(PAIRS):
        policy, reference = ours().policy, ours().reference
        cdpo = objectives.sigmoid(policy, reference, beta=0.3, label_smoothing=0.3)[n].item()
        assert cdpo == pytest.approx(trl_dpo("aot", label_smoothing=0.3, pairs=[pair])(peer()).item(), abs=VALUE)


def test_trl_bco_has_no_running_mean() -> None:
    shifted = plain("bco_pair", data={"reward_shift": torch.tensor(0.4)})(ours()).item()
    chosen, rejected = ((0.3 * r).tolist() for r in log_ratios(ours().policy, ours().reference))
    sums = [
        math.log1p(math.exp(0.4 - w)) + math.log1p(math.exp(v - 0.4)) for w, v in zip(chosen, rejected, strict=True)
    ]
    theirs = trl_dpo("bco_pair")(peer()).item()
    assert shifted == pytest.approx(sum(sums) / 4, abs=VALUE)
    assert abs(shifted - theirs) > 1e-3


def test_trl_ld_dpo_applies_to_policy_and_reference() -> None:
    """Ours applies to both too. ms-swift and LLaMA-Factory apply it only to the policy, which is a different loss."""
    sides = objectives.shared_length(*ours().tokens, *ours().masks, ld_alpha=0.5)
    policy = LogProbs(*sides, ours().policy.num_tokens_chosen, ours().policy.num_tokens_rejected, is_likelihood=True)
    policy_only = objectives.sigmoid(policy, ours().reference, beta=0.3).mean().item()
    assert abs(policy_only - trl_dpo("sigmoid", ld_alpha=0.5)(peer()).item()) > 1e-2


def test_trl_sft_is_a_mean_over_the_batchs_tokens() -> None:
    """It equals ours if all chosen completions have the same length."""
    assert abs(plain("sft")(ours()).item() - trl_dpo("sft")(peer()).item()) > 1e-3
    assert token_mean_sft(ours()).item() == pytest.approx(trl_dpo("sft")(peer()).item(), abs=VALUE)
    equal = [{**pair, "chosen_ids": pair["chosen_ids"][:2]} for pair in PAIRS]
    equal_length, _ = peer().ours(equal)
    assert plain("sft")(equal_length).item() == pytest.approx(trl_dpo("sft", pairs=equal)(peer()).item(), abs=VALUE)


def test_trl_orpo_includes_the_prompt() -> None:
    prompt_and_completion, completion = -ours().prompt_and_chosen.mean().item(), plain("sft")(ours()).item()
    difference = trl_orpo(peer()).item() - plain("orpo")(ours()).item()
    assert difference == pytest.approx(prompt_and_completion - completion, abs=VALUE)
    assert abs(difference) > 1e-2


def test_trl_cpo_differs_only_in_the_mean_of_the_sft_term() -> None:
    difference = trl_cpo("sigmoid")(peer()).item() - plain("cpo")(ours()).item()
    assert difference == pytest.approx(token_mean_sft(ours()).item() - plain("sft")(ours()).item(), abs=VALUE)


def test_trl_kto_is_half_of_ours_with_a_different_z() -> None:
    """TRL computes z from completions paired with other prompts, ours from the batch's own samples."""
    chosen, rejected = log_ratios(ours().policy, ours().reference)
    batch_z = objectives.kto_reference(chosen, rejected, beta=0.3)
    assert abs(batch_z.item() - ours().z.item()) > 1e-3
    halves = [plain("kto", data={"z": z})(ours()).item() / 2 for z in (ours().z, batch_z)]
    theirs = trl_kto("kto")(peer()).item()
    assert halves[0] == pytest.approx(theirs, abs=VALUE)
    assert abs(halves[1] - theirs) > 1e-4


def test_trl_discopop_overflows() -> None:
    """TRL's overflows at betas that image models use. Ours stays finite."""
    assert not math.isfinite(trl_dpo("discopop", beta=5000)(peer()).item())
    assert math.isfinite(plain("discopop", beta=5000)(ours()).item())


def test_parity_json_and_page_contain_these_comparisons() -> None:
    """`python -m tests.parity.table` writes both."""
    measured = json.loads(TABLE.read_text())
    rows = measured["rows"]
    assert page_with_tables(PAGE.read_text(), measured) == PAGE.read_text()
    pairs_in_table = {(row["objective"], row["peer"]) for row in rows}
    assert {(c.objective, c.peer) for c in comparisons()} <= pairs_in_table
    assert all(row["value"] <= VALUE and row["gradient"] <= GRADIENT for row in rows)
