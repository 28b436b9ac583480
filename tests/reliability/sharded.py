"""Check that a policy and its frozen copy give the same log-probs under FSDP2. test_sharded.py runs it on two processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.training.callbacks import SkipNonFiniteStepsCallback
from dpo_mm.training.memory_estimate import _row
from dpo_mm.training.reference import build_reference


def shard(model: Any) -> None:
    """Shard the blocks that the model names and the whole model, as accelerate does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # inner modules first
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(model: str, folder: Path, tuning: str) -> None:
    dist.init_process_group("gloo")
    config = TrainConfig(model, "-", "-", tuning=tuning, batch_size=2)
    policy = load_policy(model)
    rows = [{**_row(policy), "id": f"row-{n}"} for n in range(2)]
    policy.prepare(config)
    batch = policy.collate(rows)
    unsharded = policy.log_probs(policy.model, batch)
    (unsharded.chosen - 2 * unsharded.rejected).sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)

    reference = build_reference(policy, config, shard)
    shard(policy.model)
    before, log_probs = reference(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(before.chosen, log_probs.chosen)
    torch.testing.assert_close(log_probs.chosen, unsharded.chosen, atol=1e-6, rtol=0)
    (log_probs.chosen - 2 * log_probs.rejected).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], atol=1e-6, rtol=1e-4)
    local_elements = sum(p.to_local().numel() for p in policy.model.parameters())
    assert local_elements < 0.7 * sum(p.numel() for p in policy.model.parameters())

    skip_callback, state = SkipNonFiniteStepsCallback(), SimpleNamespace(global_step=0)
    skip_callback.on_pre_optimizer_step(None, state, None, model=policy.model)
    assert skip_callback.skipped == 0
    torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2).step()
    updated, reference_log_probs = policy.log_probs(policy.model, batch), reference(policy.model, batch)
    assert torch.equal(reference_log_probs.chosen, before.chosen) and not torch.allclose(updated.chosen, before.chosen)
    gathered = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        policy.save(folder, gathered)
        (folder / "chosen.txt").write_text(repr(updated.chosen.tolist()))
    dist.barrier()
    dist.destroy_process_group()
