"""Run by test_sharded.py on two processes: a policy and its frozen copy under FSDP2 answer as whole ones do."""

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
    """What accelerate does to the blocks that the model names, and to the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # from the inside out
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
    whole = policy.log_probs(policy.model, batch)
    (whole.chosen - 2 * whole.rejected).sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)

    reference = build_reference(policy, config, shard)
    shard(policy.model)
    before, now = reference(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(before.chosen, now.chosen)
    torch.testing.assert_close(now.chosen, whole.chosen, atol=1e-6, rtol=0)
    (now.chosen - 2 * now.rejected).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], atol=1e-6, rtol=1e-4)
    own = sum(p.to_local().numel() for p in policy.model.parameters())
    assert own < 0.7 * sum(p.numel() for p in policy.model.parameters())

    guard, state = SkipNonFiniteStepsCallback(), SimpleNamespace(global_step=0)
    guard.on_pre_optimizer_step(None, state, None, model=policy.model)
    assert guard.skipped == 0
    torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2).step()
    moved, kept = policy.log_probs(policy.model, batch), reference(policy.model, batch)
    assert torch.equal(kept.chosen, before.chosen) and not torch.allclose(moved.chosen, before.chosen)
    gathered = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        policy.save(folder, gathered)
        (folder / "chosen.txt").write_text(repr(moved.chosen.tolist()))
    dist.barrier()
    dist.destroy_process_group()
