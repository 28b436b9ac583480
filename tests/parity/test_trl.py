"""Our objectives against TRL's own trainers: values to 1e-5, gradients to 1e-4, in float32; and where TRL deviates.

Mutations that it catches: any sign, 1/2, swapped side, unsorted quantile or z in ours, and in TRL's next release.
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
from tests.parity.table import PAGE, WHOLE, page, summary
from tests.parity.trl_peer import (
    PAIRS,
    Comparison,
    Ours,
    Peer,
    batch_mean_sft,
    compare,
    comparisons,
    plain,
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
def test_ours_is_theirs(comparison: Comparison) -> None:
    found = compare(peer(), comparison)
    assert found.value <= VALUE
    assert found.gradient <= GRADIENT


def test_every_loss_type_of_theirs_is_compared() -> None:
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_dpo("no such loss")(peer())
    theirs = set(re.findall(r"'(\w+)'", str(error.value).split("one of")[1]))
    compared = {c.peer.removeprefix("DPOTrainer ").split(",")[0] for c in comparisons()}
    assert len(theirs) == 15 and theirs <= compared
    assert len(comparisons()) == 60


def test_the_batch_tells_things_apart() -> None:
    """Guards the comparisons: sorts that change the order, a z above 0, log-ratios of both signs, unequal lengths."""
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


# Where TRL deviates


def test_their_sigmoid_ignores_label_smoothing() -> None:
    """cDPO there is `aot` on one pair, whose sort does nothing."""
    theirs = [trl_dpo("sigmoid", label_smoothing=e)(peer()).item() for e in (0.0, 0.3)]
    assert theirs[0] == theirs[1]
    assert abs(plain("sigmoid", label_smoothing=0.3)(ours()).item() - theirs[1]) > 1e-3
    for n, pair in enumerate(PAIRS):
        policy, reference = ours().policy, ours().reference
        cdpo = objectives.sigmoid(policy, reference, beta=0.3, label_smoothing=0.3)[n].item()
        assert cdpo == pytest.approx(trl_dpo("aot", label_smoothing=0.3, pairs=[pair])(peer()).item(), abs=VALUE)


def test_their_bco_has_no_running_mean() -> None:
    shifted = plain("bco_pair", data={"reward_shift": torch.tensor(0.4)})(ours()).item()
    chosen, rejected = ((0.3 * r).tolist() for r in log_ratios(ours().policy, ours().reference))
    sums = [
        math.log1p(math.exp(0.4 - w)) + math.log1p(math.exp(v - 0.4)) for w, v in zip(chosen, rejected, strict=True)
    ]
    theirs = trl_dpo("bco_pair")(peer()).item()
    assert shifted == pytest.approx(sum(sums) / 4, abs=VALUE)
    assert abs(shifted - theirs) > 1e-3


def test_their_length_desensitising_acts_on_policy_and_reference() -> None:
    """Ours too; ms-swift and LLaMA-Factory put it on the policy alone, which is another loss."""
    sides = objectives.shared_length(*ours().tokens, *ours().masks, ld_alpha=0.5)
    policy = LogProbs(*sides, ours().policy.num_tokens_chosen, ours().policy.num_tokens_rejected, is_likelihood=True)
    alone = objectives.sigmoid(policy, ours().reference, beta=0.3).mean().item()
    assert abs(alone - trl_dpo("sigmoid", ld_alpha=0.5)(peer()).item()) > 1e-2


def test_their_sft_is_a_mean_over_the_batchs_tokens() -> None:
    """The same as ours where all chosen sides are equally long."""
    assert abs(plain("sft")(ours()).item() - trl_dpo("sft")(peer()).item()) > 1e-3
    assert batch_mean_sft(ours()).item() == pytest.approx(trl_dpo("sft")(peer()).item(), abs=VALUE)
    equal = [{**pair, "chosen_ids": pair["chosen_ids"][:2]} for pair in PAIRS]
    made, _ = peer().ours(equal)
    assert plain("sft")(made).item() == pytest.approx(trl_dpo("sft", pairs=equal)(peer()).item(), abs=VALUE)


def test_their_orpo_learns_the_prompt_too() -> None:
    prompt_too, completion = -ours().prompt_and_chosen.mean().item(), plain("sft")(ours()).item()
    difference = trl_orpo(peer()).item() - plain("orpo")(ours()).item()
    assert difference == pytest.approx(prompt_too - completion, abs=VALUE)
    assert abs(difference) > 1e-2


def test_their_cpo_differs_in_the_likelihoods_mean_alone() -> None:
    difference = trl_cpo("sigmoid")(peer()).item() - plain("cpo")(ours()).item()
    assert difference == pytest.approx(batch_mean_sft(ours()).item() - plain("sft")(ours()).item(), abs=VALUE)


def test_their_kto_is_half_of_ours_with_another_z() -> None:
    """z: theirs of completions under other prompts, ours of the batch's own samples."""
    chosen, rejected = log_ratios(ours().policy, ours().reference)
    own = objectives.kto_reference(chosen, rejected, beta=0.3)
    assert abs(own.item() - ours().z.item()) > 1e-3
    halves = [plain("kto", data={"z": z})(ours()).item() / 2 for z in (ours().z, own)]
    theirs = trl_kto("kto")(peer()).item()
    assert halves[0] == pytest.approx(theirs, abs=VALUE)
    assert abs(halves[1] - theirs) > 1e-4


def test_their_discopop_overflows() -> None:
    """At betas that image models use; ours stays finite."""
    assert not math.isfinite(trl_dpo("discopop", beta=5000)(peer()).item())
    assert math.isfinite(plain("discopop", beta=5000)(ours()).item())


def test_the_table_is_of_these_comparisons() -> None:
    """Written by `python -m tests.parity.table`."""
    kept = json.loads(TABLE.read_text())
    rows = kept["rows"]
    assert page(kept) == WHOLE.read_text()
    written = {(row["objective"], row["peer"]) for row in rows}
    assert {(c.objective, c.peer) for c in comparisons()} <= written
    assert all(row["value"] <= VALUE and row["gradient"] <= GRADIENT for row in rows)
    assert summary(rows) in PAGE.read_text()
