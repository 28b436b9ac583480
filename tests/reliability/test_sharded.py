"""FSDP2 on two CPU processes, and the accelerate configs for several GPUs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from dpo_mm.assets import presets_folder
from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.training.memory_estimate import _row
from dpo_mm.training.run import train
from tests import forked
from tests.reliability import sharded

CONFIGS = presets_folder() / "accelerate"


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_sharded_policy_equals_the_unsharded_one(tuning: str, tiny_model: str, tmp_path: Path) -> None:
    """Compares log-probs, gradients, the separately sharded frozen copy and the saved weights. The checks are in sharded.py."""
    forked.run_together(call=partial(sharded.main, tiny_model, tmp_path, tuning))
    policy = load_policy(tiny_model)
    rows = [{**_row(policy), "id": f"row-{n}"} for n in range(2)]
    policy.prepare(TrainConfig(tiny_model, "-", "-", tuning=tuning))
    policy.load_weights(tmp_path)
    with torch.no_grad():
        chosen = policy.log_probs(policy.model, policy.collate(rows)).chosen
    assert chosen.tolist() == pytest.approx(json.loads((tmp_path / "chosen.txt").read_text()), abs=1e-6)


def test_accelerate_reads_every_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted(CONFIGS.glob("*.yaml"))
    assert [path.stem for path in files] == ["ddp", "deepspeed-zero2", "fsdp2"]
    kinds = {path.stem: load_config_from_file(str(path)) for path in files}
    assert {name: kind.distributed_type.value for name, kind in kinds.items()} == {
        "ddp": "MULTI_GPU",
        "deepspeed-zero2": "DEEPSPEED",
        "fsdp2": "FSDP",
    }
    assert all(f"accelerate/{path.name}" in path.read_text() for path in files)


def test_fsdp2_settings_reach_accelerates_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    for name, value in yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"].items():
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL" in str(plugin.state_dict_type) and not plugin.cpu_ram_efficient_loading


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate runs FSDP on a GPU")
def test_fsdp_on_a_cpu_is_refused_at_the_start(
    tiny_model: str, pairs: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="asks for FSDP, which accelerate does not run on a CPU"):
        train(TrainConfig(tiny_model, pairs, out, steps=1))
    assert not Path(out).exists()
