"""Kernels of the packed sequence: no masks where none are needed, and the numbers of attention with masks."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_mm.config import TrainConfig
from dpo_mm.policies.vlm import prefix_attention
from dpo_mm.policies.vlm.token_log_probs import shared_prefix_log_probs
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.contracts.tiny_vlms import build, rows
from tests.operation_counts import OperationCounts

LAYERS = 2


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, *, window_size: Any,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of variable length as FlashAttention defines it: each sequence alone, causal from the bottom right."""
    assert window_size == (-1, 0) and int(q_ends.diff().max()) == longest_q and int(k_ends.diff().max()) == longest_k
    outputs = []
    for row in range(len(q_ends) - 1):
        queries, keys = slice(*q_ends[row : row + 2].tolist()), slice(*k_ends[row : row + 2].tolist())
        some = [tensor.transpose(0, 1)[None] for tensor in (q[queries], k[keys], v[keys])]
        length, all_keys = some[0].shape[2], some[1].shape[2]
        mask = torch.ones(length, all_keys, dtype=torch.bool).tril(all_keys - length)
        outputs.append(F.scaled_dot_product_attention(*some, attn_mask=mask, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs)


def policy_and_batch(family: str = "qwen2_5_vl", images: tuple[int, ...] = (2, 1)) -> tuple[VisionLanguage, Any]:
    policy = VisionLanguage(*build(family), family)
    policy.prepare(TrainConfig(model="m", pairs="p", output_dir="o", tuning="full", cache_vision_features=False))
    return policy, policy.collate(policy.encode(rows(family, images)))


def gradient(policy: VisionLanguage, log_probs: Tensor) -> Tensor:
    policy.model.zero_grad()
    (log_probs * torch.linspace(0.5, 1.5, log_probs.numel()).view(log_probs.shape)).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def test_varlen_gives_the_log_probs_and_gradients_of_masks_in_two_calls_per_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches wrong places or ends, padding among the keys, and rejected that is aligned at the top left."""
    kernel: Any = ModuleType("torch.nn.attention.varlen")
    kernel.varlen_attn = reference_varlen
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernel)
    policy, batch = policy_and_batch()
    assert batch["layout"].has_padding
    shared_prefix_log_probs(policy.model, batch, kernel="default")  # the tower chooses its kernel in its first call
    log_probs, gradients, calls = [], [], []
    for name in ("default", "varlen"):
        with OperationCounts() as counts:
            log_probs.append(shared_prefix_log_probs(policy.model, batch, kernel=name))
        gradients.append(gradient(policy, log_probs[-1]))
        calls.append(counts.attention)
    torch.testing.assert_close(log_probs[1], log_probs[0], rtol=1e-5, atol=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    assert calls[0] - calls[1] == LAYERS * (3 - 2 * 2)  # the stand-in calls torch's attention once per row


def test_rows_without_padding_take_two_calls_per_layer_and_no_square_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = policy_and_batch("llava", (1,))
    assert not batch["layout"].has_padding
    policy.log_probs(policy.model, batch)
    masks = []
    attend = F.scaled_dot_product_attention

    def record(*tensors: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        masks.append((attn_mask is not None, options["is_causal"]))
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    shared_prefix_log_probs(policy.model, batch)  # with the features of the images
    assert masks == [(False, True), (True, False)] * LAYERS


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_from_the_bottom_right_is_that_of_a_mask(groups: int) -> None:
    """Catches an alignment at the top left, a lost scale, and heads in another order."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = torch.randn(2, 2, 4 // groups, 5, 8, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=groups > 1)
    output = prefix_attention._attend_lower_right(torch.nn.Identity(), query, key, value, scaling=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "padding", "installed", "expected"),
    [
        ("cpu", torch.bfloat16, (9, 0), True, True, ["default"]),
        ("cuda", torch.bfloat16, (9, 0), True, True, ["varlen", "flash", "efficient", "math"]),
        ("cuda", torch.bfloat16, (9, 0), True, False, ["flash", "efficient", "math"]),
        ("cuda", torch.bfloat16, (9, 0), False, True, ["flash", "efficient", "math"]),
        ("cuda", torch.float32, (9, 0), True, True, ["flash", "efficient", "math"]),
        ("cuda", torch.float16, (7, 5), True, True, ["flash", "efficient", "math"]),
    ],
)
def test_kernels_fit_the_card(
    device: str, dtype: torch.dtype, capability: tuple[int, int], padding: bool, installed: bool, expected: list[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(prefix_attention, "has_varlen", lambda: installed)
    model = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert prefix_attention.kernels(model, has_padding=padding) == expected
    assert ("A newer torch" in caplog.text) == (not installed)


@pytest.mark.parametrize(("kernel", "flash"), [("default", False), ("varlen", True), ("flash", True), ("math", False)])
def test_default_kernel_leaves_the_choice_of_the_caller(kernel: str, flash: bool) -> None:
    """Catches a measurement of one backend that measures another."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), prefix_attention.backends(kernel, torch.device("cuda")):
        assert torch.backends.cuda.flash_sdp_enabled() == flash
        assert torch.backends.cuda.cudnn_sdp_enabled() == (kernel == "default")
