"""`compile: true`: the same log-probs and gradients, the same files, and a run that continues if compiling fails."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from dpo_mm.config import TrainConfig
from dpo_mm.policies.adapters import LORA_FILE
from dpo_mm.policies.families import load_policy
from dpo_mm.training import compilation
from dpo_mm.training.compilation import blocks_of, compiled, is_compiled
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import build_reference
from dpo_mm.training.run import train
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS
from tests.contracts.test_diffusion import encoded_rows

pytestmark = pytest.mark.slow


def prepared(family: str, folder: Path, config: TrainConfig) -> tuple[Any, PairStream]:
    """A policy whose LoRA changes the output, and rows of two lengths or sizes of prompts."""
    if family in BUILDERS:
        policy = load_policy(str(BUILDERS[family].build(folder)), resolution=BUILDERS[family].size)
        rows = encoded_rows(policy, 2)
    else:
        policy = load_policy(tiny_vlms.save(family, folder / "model"))
        rows = policy.encode(Dataset.from_list(tiny_vlms.rows(family, (1, 1))))
    policy.prepare(config)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    return policy, PairStream(rows, seed=0, length=4)


def step(policy: Any, reference: Any, stream: PairStream) -> list[torch.Tensor]:
    """Log-probs of the policy and the reference, and gradients."""
    policy.model.zero_grad()
    batch = policy.collate([stream[n] for n in range(2)])
    before, log_probs = reference(policy.model, batch), policy.log_probs(policy.model, batch)
    (log_probs.chosen - log_probs.rejected).sum().backward()
    gradients = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
    return [log_probs.chosen.detach(), log_probs.rejected.detach(), before.chosen, *gradients]


@pytest.mark.parametrize(
    ("family", "number", "changes"), [("sd3", 1, {"tuning": "full"}), ("qwen2_5_vl", 2, {"beta": 0.1})]
)
def test_compiled_blocks_give_the_same_step(
    family: str, number: int, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches blocks that lose the adapter, the layout of a shared prefix or gradients, and a reference that is not compiled."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = TrainConfig("-", "-", "-", precision="fp32", compile=True, batch_size=2, **changes)
    policy, stream = prepared(family, tmp_path, config)
    names = sorted(policy.model.state_dict())
    expected = step(policy, build_reference(policy, dataclasses.replace(config, compile=False)), stream)
    with compiled(policy, config, stream) as line:
        assert is_compiled(policy) and line["compile"].startswith(str(len(blocks_of(policy, policy.model))))
        found = step(policy, build_reference(policy, config), stream)
        assert sorted(policy.model.state_dict()) == names
    assert not is_compiled(policy) and len(found) == len(expected) > 5
    assert len(blocks_of(policy, policy.model)) == number
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_run_with_compiled_blocks_writes_the_same_files(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks of a UNet, with checkpointing: the backend "eager" traces them and runs them as they are.

    A backend that fails leaves the run without it.
    """

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nhere")

    settings = {"steps": 2, "batch_size": 2, "eval_fraction": 0.0, "gradient_checkpointing": True}
    config = TrainConfig(tiny_model, pairs, str(tmp_path / "plain"), **settings)
    expected = train(config)
    for name, backend in (("eager", "eager"), ("fails", fails)):
        monkeypatch.setattr(compilation, "BACKEND", backend)
        with caplog.at_level("WARNING") if backend == fails else contextlib.nullcontext():
            result = train(dataclasses.replace(config, output_dir=str(tmp_path / name), compile=True))
        assert (result.folder / LORA_FILE).read_bytes() == (expected.folder / LORA_FILE).read_bytes()
        line = "off, because torch.compile failed" if backend == fails else "BasicTransformerBlock"
        assert line in result.settings["compile"]
    assert [r.getMessage() for r in caplog.records if "compile" in r.getMessage()] == [
        "compile: torch.compile failed, and the run continues without it "
        "(backend='fails' raised: RuntimeError: no C++ compiler here)"
    ]
