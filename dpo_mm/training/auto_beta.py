"""Choose beta from the reference's log-probs before the first step (`beta: auto`).

Before training every margin is 0, so its scale cannot be measured. The spread of its parts can. With s the standard deviation
over pairs of log p(chosen) - log p(rejected) under the reference, each image at its own noise,

    beta = 1 / (SHARE * s)

so that |beta * delta| is 1, where the logistic loss bends, if the policy has moved a margin by that fraction of the spread.
The fraction differs by modality: a tuned denoiser's errors stay within per cents of the reference's, and a response's
log-prob moves by much of itself. For objectives of log-probs per token, s is that of log-probs per token.
docs/background/experiments.md compares the result with betas found by search.
"""

from __future__ import annotations

import math

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import keyword_settings
from dpo_mm.policies.protocol import Policy
from dpo_mm.training.objective_settings import PER_TOKEN, objective_names
from dpo_mm.training.pair_stream import PairStream

AUTO = "auto"
PAIRS = 64
SHARE = {"image": 0.02, "text": 0.5}
"""Fraction of the spread by which a tuned policy moves a margin, by modality."""


def measure_beta(policy: Policy, stream: PairStream, config: TrainConfig) -> float:
    """Measure beta on the first PAIRS pairs of a run, on one process for all.

    Args:
        policy: the prepared policy.
        stream: the run's pairs.
        config: settings of the run.

    Returns:
        beta in 1/nats, rounded to two digits so that it is equal on every machine.

    Raises:
        ValueError: if all pairs have the same log-prob difference, or one that is not finite.
    """
    from accelerate.utils import broadcast_object_list, send_to_device

    device, found = next(policy.model.parameters()).device, []
    per_token = {name for name in objective_names(config) if "beta" in keyword_settings(name)} <= set(PER_TOKEN)
    for start in range(0, PAIRS, config.batch_size):
        rows = [stream[n] for n in range(start, start + config.batch_size)]
        with torch.no_grad():
            said = policy.log_probs(policy.model, send_to_device(policy.collate(rows), device))
        sides = (said.chosen, said.num_tokens_chosen), (said.rejected, said.num_tokens_rejected)
        chosen, rejected = (log_probs / tokens if per_token else log_probs for log_probs, tokens in sides)
        found.append((chosen - rejected).float().cpu())
    spread = torch.cat(found).std().item()
    if not math.isfinite(spread):
        raise ValueError(
            "beta 'auto' needs finite log-probs, and those of the first pairs are not. Take precision fp32"
        )
    if not spread > 0:
        raise ValueError("beta 'auto' needs pairs whose log-probs differ; these are all alike, give beta a number")
    return float(broadcast_object_list([f"{1 / (SHARE[policy.modality] * spread):.2g}"])[0])
