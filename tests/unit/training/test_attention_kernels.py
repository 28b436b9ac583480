"""cuDNN's attention is off in a run, and only there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.training.attention_kernels import describe_attention, without_cudnn_attention
from dpo_mm.training.run import train


@pytest.fixture(params=[True, False])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_setting_is_restored_after_an_error(enabled: bool) -> None:
    with pytest.raises(KeyError), without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_run_has_no_cudnn_attention(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Catches a context manager around a part of the run only: precomputing the reference, or training."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    config = TrainConfig(tiny_model, pairs, str(tmp_path / "out"), steps=1, batch_size=1, eval_fraction=0.0)
    config = dataclasses.replace(config, reference="precomputed", fixed_draws_per_row=1)
    states, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: object, **options: object) -> torch.Tensor:
        states.add((torch.is_grad_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(*args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
        train(config)
    assert states >= {(True, False), (False, False)} and (True, True) not in states
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_plan_names_the_kernels_on_a_gpu_only() -> None:
    assert "cuDNN's are off" in describe_attention("cuda")["attention"]
    assert describe_attention("cpu") == {}
