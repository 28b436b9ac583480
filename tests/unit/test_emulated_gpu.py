"""Branches for CUDA compute what the CPU's do, shown on an emulated GPU."""

from __future__ import annotations

import pytest
import torch

from tests.bench.emulated_gpu import compare
from tests.emulated_gpu import EmulatedTensor, emulated_gpu, values_of


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [("stable-diffusion", "bf16"), ("qwen2_5_vl", "fp32")])
def test_run_logs_what_it_logs_on_the_cpu(family: str, precision: str) -> None:
    """Catches a tensor on the wrong device, and a branch for CUDA with other draws, positions or windows."""
    assert compare(family, {"steps": 2, "precision": precision}) == {"equal": True, "logged": 2}


def test_operation_on_both_devices_fails() -> None:
    with emulated_gpu():
        weights = torch.nn.Linear(3, 2).to("cuda")
        image = torch.ones(1, 3)
        assert weights.weight.device.type == "cuda" and torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="same device"):
            weights(image)
        weights(image.to("cuda")).sum().backward()
        assert isinstance(weights.weight.grad, EmulatedTensor)
        torch.testing.assert_close(values_of(weights.weight.grad), torch.ones(2, 3))
        with pytest.raises(TypeError, match="numpy"):
            weights.weight.detach().numpy()
    assert torch.ones(1).device.type == "cpu" and torch.cuda.get_device_properties.__module__ == "torch.cuda"
