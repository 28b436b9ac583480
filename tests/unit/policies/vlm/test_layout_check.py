"""The check of the first batch in bfloat16: rounding passes, a leak does not, and a wrong kernel is replaced."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mm.policies.vlm import layout_check, shared_prefix, token_log_probs
from dpo_mm.policies.vlm.float32_head import float32_logits
from dpo_mm.policies.vlm.prefix_attention import attend_with_mask
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.contracts.tiny_vlms import build, rows


def checked_policy(**options: Any) -> VisionLanguage:
    """A policy in bfloat16 that has checked a batch."""
    model, processor = build("llava")
    policy = VisionLanguage(model.to(torch.bfloat16), processor, "m", **options)
    with torch.no_grad():
        policy.token_log_probs.check(policy.model, policy.collate(policy.encode(rows("llava", (2, 1)))))
    return policy


def leak_a_little(*arguments: Any, **options: Any) -> Tensor:
    """Attention in which rejected sees a thousandth of chosen."""
    output, layout = attend_with_mask(*arguments, **options), arguments[-1]
    seen = output[:, layout.prompt : layout.rejected_start].mean(1, keepdim=True)
    parts = output.split([layout.rejected_start, layout.rejected], dim=1)
    return torch.cat([parts[0], parts[1] + 0.01 * seen], dim=1)


def test_leak_below_the_rounding_of_bfloat16_is_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_prefix, "attend_with_mask", leak_a_little)
    assert checked_policy().token_log_probs.layout == "separate"
    assert "a shared prefix lets rejected see chosen" in caplog.text and "allowed 0.0e+00" in caplog.text


def test_attention_that_rounds_more_is_not_taken_for_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error depends on a token's column, and exceeds the least limit. It catches a fixed limit."""
    attend = F.scaled_dot_product_attention

    def coarse(*arguments: Any, **options: Any) -> Tensor:
        output = attend(*arguments, **options)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        return output * (1 + 0.1 * noise).to(output.dtype)

    monkeypatch.setattr(F, "scaled_dot_product_attention", coarse)
    log_probs = checked_policy().token_log_probs
    assert log_probs.layout == "shared_prefix" and log_probs.limit > 5e-3
    monkeypatch.setattr(layout_check, "ROUNDING_FACTOR", 0)
    assert checked_policy().token_log_probs.layout == "separate"


def test_wrong_kernel_is_named_with_its_number_and_the_next_one_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attend(*arguments: Any, **options: Any) -> Tensor:
        kernel = arguments[-1].kernel
        if kernel == "broken":
            raise RuntimeError("no kernel")
        return (leak_a_little if kernel == "leaking" else attend_with_mask)(*arguments, **options)

    monkeypatch.setattr(token_log_probs, "kernels", lambda *_, **__: ["broken", "leaking", "right"])
    monkeypatch.setattr(shared_prefix, "attend_with_mask", attend)
    with caplog.at_level(logging.WARNING):
        log_probs = checked_policy().token_log_probs
    assert (log_probs.layout, log_probs.kernel) == ("shared_prefix", "right")
    (line,) = [record.message for record in caplog.records if "attention is computed by" in record.message]
    assert "'right'" in line and "'broken' RuntimeError: no kernel" in line and "'leaking' lets rejected" in line


# The head


def test_capped_logits_are_recognised_in_bfloat16() -> None:
    """Catches the limit of float32, which takes their rounding for an unknown change and computes all logits."""
    model, processor = build("gemma2")
    policy = VisionLanguage(model.to(torch.bfloat16), processor, "m")
    batch = policy.collate(policy.encode(rows("gemma2", (0, 0))))
    with torch.no_grad():
        assert token_log_probs.detect_head(model, batch) == "finished"


def test_head_in_half_precision_gives_the_logits_of_float32_and_the_gradients_of_half() -> None:
    """Catches logits that are rounded to bfloat16: their error is a thousand times larger."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 100).to(torch.bfloat16)
    states = (4 * torch.randn(5, 64, generator=generator)).to(torch.bfloat16).requires_grad_()
    exact = states.detach().double() @ head.weight.detach().double().t() + head.bias.detach().double()
    logits = float32_logits(head, head.forward, states)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 and (head(states) - exact).abs().max() > 5e-3
    weights = torch.randn(5, 100, generator=generator)
    leaves = (states, head.weight, head.bias)
    ours = torch.autograd.grad((logits * weights).sum(), leaves)
    expected = torch.autograd.grad((head(states).float() * weights).sum(), leaves)
    for gradient, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=2e-2)


def test_head_under_autocast_gives_float32_logits_of_rounded_inputs() -> None:
    head, states = torch.nn.Linear(64, 100), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rounded = [tensor.detach().to(torch.bfloat16).double() for tensor in (states, head.weight, head.bias)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = float32_logits(head, head.forward, states)
    exact = rounded[0] @ rounded[1].t() + head.bias.detach().double()
    assert (logits - exact).abs().max() < 1e-5
    assert torch.equal(float32_logits(head, head.forward, states), head(states))


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="the setting is new in torch 2.9")
def test_products_in_tf32_are_seen_after_the_trainer_enabled_them() -> None:
    """From then on, torch refuses to read the setting of earlier releases."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert not layout_check.has_tf32_products()
    try:
        matmul.fp32_precision = "tf32"
        assert layout_check.has_tf32_products()
    finally:
        matmul.fp32_precision = before
