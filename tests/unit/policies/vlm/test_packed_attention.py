"""Attention of vision towers in few calls equals one call per window, and a kernel that differs is not used."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm import packed_attention
from dpo_mm.policies.vlm.packed_attention import KERNELS, NAME, pack_vision_attention, packed_sequences
from dpo_mm.policies.vlm.vision_features import vision_features
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.bench.vision_windows import images, measure, tower
from tests.contracts.tiny_vlms import build, rows, save

TOWERS = (
    "glm46v",
    "glm_ocr",
    "minicpmv4_6",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
)
LENGTHS = (3, 8, 3, 1, 8)


@pytest.fixture(autouse=True)
def unchecked_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packed_attention, "_CHOSEN", {})
    yield


def packed_row(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments that a tower passes to an attention with "flash" in its name, with five sequences in one row."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, sum(LENGTHS), 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {
        "module": nn.Identity(),
        **dict(zip(("query", "key", "value"), tensors, strict=True)),
        "attention_mask": None,
        "scaling": 0.25,
        "dropout": 0.0,
        "is_causal": False,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


def masked(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    """Attention of (tokens, heads, width) within sequences, by a mask of the whole row."""
    sequence = torch.arange(len(boundaries) - 1).repeat_interleave(boundaries.diff().long())
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(sequence[:, None] != sequence[None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def attend(arguments: dict[str, Any]) -> list[Tensor]:
    """Output of the attention function and its gradients."""
    output = packed_attention._attention(**arguments)[0]
    return [
        output,
        *torch.autograd.grad(output.square().sum(), [arguments[name] for name in ("query", "key", "value")]),
    ]


def by_mask(arguments: dict[str, Any]) -> list[Tensor]:
    tensors = [arguments[name] for name in ("query", "key", "value")]
    output = masked(*(t[0].transpose(0, 1) for t in tensors), arguments["cu_seq_lens_q"], arguments["scaling"])[None]
    return [output, *torch.autograd.grad(output.square().sum(), tensors)]


def test_sequences_are_grouped_by_length() -> None:
    packed = packed_sequences(torch.tensor([0, 3, 11, 14, 14, 15, 23]))
    assert packed.lengths == (3, 8, 3, 0, 1, 8) and packed.groups == ((1, 1), (2, 3), (2, 8))
    assert packed.order is not None and packed.inverse is not None
    assert packed.order.tolist() == [14, 0, 1, 2, 11, 12, 13, *range(3, 11), *range(15, 23)]
    assert torch.equal(packed.order[packed.inverse], torch.arange(23))
    equal = packed_sequences(torch.tensor([0, 4, 8, 12]))
    assert equal.groups == ((3, 4),) and equal.order is None and equal.inverse is None


def test_output_and_gradients_are_those_of_a_mask_and_one_call_per_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens that return to other places, sequences that attend to their neighbours, and a scale that is lost."""
    arguments, calls = packed_row(), []
    for result, expected in zip(attend(arguments), by_mask(arguments), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    counted = lambda *a, **k: calls.append(1) or sdpa_attention_forward(*a, **k)
    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", counted)
    attend(arguments)
    assert len(calls) == 3  # lengths 1, 3 and 8
    alone = {name: value for name, value in arguments.items() if "length" not in name and "cu_seq" not in name}
    whole = sdpa_attention_forward(
        *(alone[name] for name in ("module", "query", "key", "value")), None, scaling=0.25, is_causal=False
    )
    assert torch.equal(packed_attention._attention(**alone)[0], whole[0])


@pytest.mark.parametrize("family", TOWERS)
def test_features_are_bit_equal_to_those_of_one_call_per_sequence(family: str) -> None:
    """Images of unequal sizes, so that windows and images have unequal lengths."""
    model, processor = build(family)
    policy = VisionLanguage(model, processor, family)
    batch, fingerprint = policy.collate(policy.encode(rows(family, (2, 0, 1)))), policy.fingerprint()
    model.set_attn_implementation("sdpa")
    expected = vision_features(model, batch)
    assert policy.fingerprint() == fingerprint and not packed_attention._CHOSEN
    pack_vision_attention(model)
    towers = [module for module in model.modules() if getattr(module, "config", None) and uses_packed(module)]
    assert towers and not uses_packed(model) and not uses_packed(model.get_decoder())
    result = vision_features(model, batch)
    assert "by length" in packed_attention._CHOSEN.values()
    torch.testing.assert_close(result, expected, atol=0, rtol=0)
    assert policy.fingerprint() == fingerprint


def uses_packed(module: nn.Module) -> bool:
    return bool(module.config._attn_implementation == NAME)  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "attention"), [("qwen2_5_vl", "eager"), ("llava", "sdpa"), ("llama", "sdpa")])
def test_other_attention_and_other_towers_do_not_change(family: str, attention: str) -> None:
    model, _ = build(family)
    model.set_attn_implementation(attention)
    pack_vision_attention(model)
    with_config = [module for module in model.modules() if hasattr(module, "config")]
    assert with_config and all(module.config._attn_implementation == attention for module in with_config)


@pytest.mark.parametrize("layout", ["separate", "shared_prefix"])
def test_trained_tower_has_the_gradients_of_one_call_per_window(layout: str, tmp_path: Any) -> None:
    """With gradient checkpointing, in a model that was loaded from files."""
    policy = load_policy(save("qwen2_5_vl", tmp_path), train_vision_tower=True, pair_layout=layout)
    assert isinstance(policy, VisionLanguage)
    settings = {"model": "m", "pairs": "p", "output_dir": "o", "tuning": "full", "gradient_checkpointing": True}
    policy.prepare(TrainConfig(**settings))
    batch = policy.collate(policy.encode(rows("qwen2_5_vl", (2, 1))))
    tower, results = policy.base_model.model.visual, []
    for name in (NAME, "sdpa"):
        tower.config._attn_implementation = name
        policy.model.zero_grad()
        log_probs = policy.log_probs(policy.model.train(), copy.copy(batch))
        (log_probs.chosen - log_probs.rejected).sum().backward()
        assert tower.config._attn_implementation == name
        results.append([log_probs.chosen, *(parameter.grad for parameter in tower.parameters())])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
    assert results[0][-1].abs().sum() > 0


def test_rejected_shared_prefix_leaves_the_attention_of_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text attention that is restored for the whole model."""
    model, processor = build("qwen2_5_vl")
    model.config.get_text_config()._attn_implementation = "eager"
    policy = VisionLanguage(model, processor, "m")
    monkeypatch.setattr("dpo_mm.policies.vlm.token_log_probs.why_not_shared", lambda *a: "differs")
    policy.log_probs(model, policy.collate(policy.encode(rows("qwen2_5_vl", (1,)))))
    assert (
        policy.token_log_probs.layout == "separate" and model.config.get_text_config()._attn_implementation == "eager"
    )
    assert uses_packed(model.model.visual)


def test_tower_of_32_layers_makes_one_call_per_layer_and_layers_do_not_wait() -> None:
    """Catches windows that are called one by one, and indices or boundaries that each layer computes again."""
    counts = measure(tower(), images(24, 24))
    assert counts["largest_difference"] == 0
    assert counts["one call per window"]["attention"] == 28 * 36 + 4 and counts["packed"]["attention"] == 32
    assert counts["packed"]["launches"] < counts["one call per window"]["launches"] / 1.9
    assert counts["packed"]["synchronisations"] < 32 <= counts["one call per window"]["synchronisations"]


# Kernels on a GPU


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.linspace(0.5, 1.5, gradient.shape[2])[:, None]


def fails(*arguments: Any, **options: Any) -> Tensor:
    raise RuntimeError("mha_graph.execute returned false\nmore")


def last_window_is_wrong(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> Any:
    output = KERNELS["one by one"](module, query, key, value, *rest, **options)
    return torch.cat([output[:, : -LENGTHS[-1]], output[:, -LENGTHS[-1] :].roll(1, 1)], 1)


def not_finite(*arguments: Any, **options: Any) -> Tensor:
    return KERNELS["one by one"](*arguments, **options) * torch.nan


def gradient_is_wrong(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Tensor:
    return KERNELS["one by one"](module, WrongBackward.apply(query), *rest, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (fails, "fails (RuntimeError: mha_graph.execute returned false)"),
        (last_window_is_wrong, "differs from SDPA by"),
        (not_finite, "differs from SDPA by inf"),
        (gradient_is_wrong, "differs from SDPA by"),
    ],
)
def test_wrong_kernel_is_not_used_and_a_line_says_why(
    kernel: Callable[..., Any],
    reason: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = packed_row(dtype)
    expected = attend(arguments)
    monkeypatch.setattr(packed_attention, "_CHOSEN", {})
    monkeypatch.setattr(packed_attention, "_candidates", lambda *a: ["varlen", "by length", "one by one"])
    monkeypatch.setitem(KERNELS, "varlen", kernel)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(attend(arguments), expected, atol=0, rtol=0)
    (record,) = [record.getMessage() for record in caplog.records if record.name == packed_attention.__name__]
    assert "the attention kernel 'varlen'" in record and reason in record and "\n" not in record
    assert list(packed_attention._CHOSEN.values()) == ["by length"]


@pytest.mark.parametrize(
    ("name", "module", "function", "scale"),
    [
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", "scale"),
        ("FlashAttention", "flash_attn", "flash_attn_varlen_func", "softmax_scale"),
    ],
)
def test_kernel_of_variable_length_gets_the_row_and_its_boundaries(
    name: str, module: str, function: str, scale: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kernel(
        query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, longest: int, same: int, **options: Any
    ) -> Tensor:
        assert torch.equal(begin, end) and begin.dtype == torch.int32 and longest == same == max(LENGTHS)
        assert all(tensor.shape == (sum(LENGTHS), 2, 8) and tensor.is_contiguous() for tensor in (query, key, value))
        return masked(query, key, value, begin, options[scale])

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: kernel}))
    monkeypatch.setattr(packed_attention, "_candidates", lambda *a: [name, "by length", "one by one"])
    arguments = packed_row()
    torch.testing.assert_close(attend(arguments), by_mask(arguments), atol=1e-6, rtol=1e-6)
    assert list(packed_attention._CHOSEN.values()) == [name] and not caplog.records


@pytest.mark.parametrize(
    ("changes", "capability", "longest", "fits"),
    [
        ({}, (9, 0), 128, True),
        ({}, (9, 0), 129, False),
        ({}, (8, 6), 4096, True),
        ({}, (7, 5), 64, False),
        ({"dtype": torch.float32}, (9, 0), 64, False),
        ({"is_cuda": False}, (9, 0), 64, False),
        ({"shape": (1, 16, 64, 36)}, (9, 0), 64, False),
        ({"shape": (1, 32, 64, 80)}, (9, 0), 64, False),
    ],
)
def test_variable_length_needs_a_card_half_precision_and_sizes_that_it_has(
    changes: dict[str, Any], capability: tuple[int, int], longest: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(packed_attention.importlib.util, "find_spec", lambda name: name if "torch" in name else None)
    key: Any = SimpleNamespace(shape=(1, 16, 64, 80), dtype=torch.bfloat16, is_cuda=True, device="cuda")
    query: Any = SimpleNamespace(**{**vars(key), **changes})
    names = packed_attention._candidates(query, key, longest, {"dropout": 0.0})
    assert names == [*(["varlen"] if fits else []), "by length", "one by one"]
    assert "varlen" not in packed_attention._candidates(key, key, 64, {"dropout": 0.1})
