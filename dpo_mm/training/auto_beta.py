"""`beta: auto`: beta from what the model says of the pairs before the first step.

Before training every margin is 0, so its scale can't be seen; the spread of what it is made of can. With s the standard
deviation over pairs of log p(chosen) - log p(rejected) under the reference, each image at its own draw,

    beta = 1 / (SHARE * s)

so that |beta * delta| is 1, the logistic loss's bend, for a policy that moved a margin by that share of the spread. The
share is another for pictures than for answers: a tuned denoiser's errors stay within per cents of the reference's,
while an answer's log-prob moves by much of itself. docs/background/experiments.md has what it gave beside betas found by hand.
"""

from __future__ import annotations

import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.protocol import Policy
from dpo_mm.training.pair_stream import PairStream

AUTO = "auto"
PAIRS = 64
SHARE = {"image": 0.02, "text": 0.5}
"""By modality: of the spread, what a tuned policy moves a margin by."""


def measure_beta(policy: Policy, stream: PairStream, config: TrainConfig) -> float:
    """1/nats, rounded to two digits so that it is the same on every machine, and the same on every process.

    stream: the run's pairs; its first PAIRS are asked, however short the run. Raises ValueError where all pairs are alike.
    """
    from accelerate.utils import broadcast_object_list, send_to_device

    device, found = next(policy.model.parameters()).device, []
    for start in range(0, PAIRS, config.batch_size):
        rows = [stream[n] for n in range(start, start + config.batch_size)]
        with torch.no_grad():
            said = policy.log_probs(policy.model, send_to_device(policy.collate(rows), device))
        found.append((said.chosen - said.rejected).float().cpu())
    spread = torch.cat(found).std().item()
    if not spread > 0:
        raise ValueError("beta 'auto' needs pairs whose log-probs differ; these are all alike, give beta a number")
    return float(broadcast_object_list([f"{1 / (SHARE[policy.modality] * spread):.2g}"])[0])
