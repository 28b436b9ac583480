"""Contracts of every vision-language family. To add a family, add its builder to tiny_vlms."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import LogProbs, deltas, sigmoid
from dpo_mm.policies.vlm import shared_prefix, token_log_probs
from dpo_mm.policies.vlm.batch_decoding import SIDE_BY_SIDE, decode_batch
from dpo_mm.policies.vlm.decoding import Decoding
from dpo_mm.policies.vlm.generation import batch_inputs, generation_limits
from dpo_mm.policies.vlm.token_log_probs import separate_log_probs
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage, lora_targets
from dpo_mm.training.reference import adapter_off, frozen_copy
from tests.contracts import tiny_vlms
from tests.contracts.tiny_vlms import IMAGES, build, rows, save
from tests.contracts.trained_weights import restored_weights

FAMILIES = tuple(sorted((*IMAGES, "llama")))
SPECIAL_TEXT_MODELS = ("gemma2", "qwen3_next")
"""Text-only models with special layers: soft-capped logits, linear attention."""


def test_every_builder_is_tested() -> None:
    assert sorted((*FAMILIES, *SPECIAL_TEXT_MODELS)) == sorted(tiny_vlms.BUILDERS) and len(FAMILIES) == 25


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", pairs="p", output_dir="o", beta=0.1, lora_rank=4, lora_alpha=8, **changes)


def images_per_row(family: str) -> tuple[int, ...]:
    """Images per row: several for families with images, and one row without an image if the family allows it."""
    if family.startswith("paligemma"):
        return (2, 1, 3)
    if family in ("deepseek_ocr2", "gemma4"):
        return (1, 0, 2)  # 70 to 433 tokens per image
    first = 1 if family == "llava_onevision" else 2  # LLaVA-OneVision cuts an image into tiles if it is the only one
    return (first, 0, 3) if family in IMAGES else (0, 0, 0)


def policy_of(
    family: str, *, trained: bool = True, options: dict[str, Any] | None = None, **changes: Any
) -> VisionLanguage:
    """A policy whose LoRA changes the model. With trained=False the LoRA is fresh."""
    policy = VisionLanguage(*build(family), family, **(options or {}))
    policy.prepare(config(**changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if trained and "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return policy


@functools.cache
def shared_policy(family: str) -> VisionLanguage:
    """A policy whose LoRA changes the model, cached for tests that do not modify it."""
    return policy_of(family)


@functools.cache
def checkpointing_policy(family: str) -> VisionLanguage:
    """The same with activations that are computed again in the backward pass, which the check of the first batch does not have."""
    return as_checked(policy_of(family, gradient_checkpointing=True), family)


@functools.cache
def fully_tuned_policy(family: str) -> VisionLanguage:
    """A policy that trains all weights, also those of the vision tower. No test changes them."""
    return as_checked(policy_of(family, options={"train_vision_tower": True}, tuning="full"), family)


def as_checked(policy: VisionLanguage, family: str) -> VisionLanguage:
    """Give a policy the layout and the head that the shared policy found, instead of a check of its first batch."""
    shared = shared_policy(family)
    shared.log_probs(shared.model, batch_of(shared, family))
    policy.token_log_probs, policy.features_are_exact = shared.token_log_probs, shared.features_are_exact
    assert policy.token_log_probs.checked and policy.token_log_probs.layout == "shared_prefix"
    return policy


@contextlib.contextmanager
def fresh_adapter(policy: VisionLanguage) -> Iterator[None]:
    """Context manager in which the LoRA is that of a new run. Afterwards it is what it was before."""
    with restored_weights(policy):
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        yield


@functools.cache
def encoded_rows(family: str) -> list[dict[str, Any]]:
    """Three encoded rows. No test changes them."""
    return shared_policy(family).encode(rows(family, images_per_row(family)))


def batch_of(policy: VisionLanguage, family: str) -> dict[str, Any]:
    return policy.collate(encoded_rows(family))


def upstream_log_prob(policy: VisionLanguage, row: dict[str, Any], side: str) -> Tensor:
    """Log-prob of one completion by the upstream model's forward pass on one unpadded sequence, from all its logits."""
    prompt, completion = row["prompt_ids"], row[f"{side}_ids"]
    token_type = 1 if policy.base_model.config.model_type == "paligemma" else 0  # PaliGemma 2 has this model type too
    types = {k: torch.cat([v, torch.full_like(completion, token_type)])[None] for k, v in row["types"].items()}
    logits = policy.model(
        input_ids=torch.cat([prompt, completion])[None], use_cache=False, **types, **row["images"]
    ).logits
    token_log_probs = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return token_log_probs.gather(1, completion[:, None]).sum()


def separate_forward_passes(policy: VisionLanguage, encoded: list[dict[str, Any]]) -> LogProbs:
    chosen, rejected = (
        torch.stack([upstream_log_prob(policy, row, side) for row in encoded]) for side in ("chosen", "rejected")
    )
    ones = torch.ones_like(chosen)
    return LogProbs(chosen, rejected, ones, ones, is_likelihood=True)


def gradients(policy: VisionLanguage, log_probs: LogProbs) -> Tensor:
    """Gradients of a loss that depends on every log-prob, as one vector."""
    policy.model.zero_grad(set_to_none=True)
    weights = torch.linspace(0.5, 1.5, len(log_probs.chosen))
    (weights * (log_probs.chosen - 0.7 * log_probs.rejected)).mean().backward()
    parts = [
        p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
        for p in policy.model.parameters()
        if p.requires_grad
    ]
    return torch.cat(parts)


def largest_difference(log_probs: Tensor, expected: Tensor) -> float:
    """The largest relative difference of log-probs."""
    return float(((log_probs - expected).abs() / expected.abs().clamp(min=1)).max().detach())


def assert_log_probs_close(log_probs: LogProbs, expected: LogProbs, tolerance: float) -> None:
    assert (
        largest_difference(log_probs.chosen, expected.chosen) < tolerance
        and largest_difference(log_probs.rejected, expected.rejected) < tolerance
    )


def assert_gradients_close(gradient: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((gradient - expected).norm() / expected.norm()) < tolerance and float(expected.norm()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_gives_the_reference_log_probs_despite_dropout(family: str, record_property: Any) -> None:
    model, processor = build(family)
    record_property("of", type(model).__name__)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.5)
    layer = model.get_decoder().layers[0]
    if family == "lfm2_vl":
        layer.feed_forward = nn.Sequential(layer.feed_forward, nn.Dropout(0.5))
    else:
        layer.mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    policy = VisionLanguage(model, processor, family)
    policy.prepare(config())
    batch = batch_of(policy, family)
    policy.model.train()
    reference = adapter_off(policy)(policy.model, batch)
    log_probs = policy.log_probs(policy.model, batch)
    assert torch.equal(log_probs.chosen, reference.chosen) and torch.equal(log_probs.rejected, reference.rejected)
    assert torch.equal(sigmoid(log_probs, reference, beta=0.1), torch.full((3,), math.log(2)))
    assert (
        policy.token_log_probs.layout == "shared_prefix" and log_probs.is_likelihood and log_probs.chosen.requires_grad
    )
    policy.model.eval()
    assert torch.equal(policy.log_probs(policy.model, batch_of(policy, family)).chosen, log_probs.chosen)


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl", "qwen3_5"])
def test_trained_adapter_differs_from_the_reference_and_a_frozen_copy_is_unchanged(family: str) -> None:
    policy = policy_of(family)
    batch = batch_of(policy, family)
    policy.log_probs(policy.model, batch)  # before the copy, which must not run the layers of the original
    copy = frozen_copy(policy)
    before, log_probs = copy(policy.model, batch), policy.log_probs(policy.model, batch).detach()
    assert torch.equal(before.chosen, log_probs.chosen)
    assert largest_difference(adapter_off(policy)(policy.model, batch).chosen, log_probs.chosen) > 1e-3
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.1)
    assert torch.equal(copy(policy.model, batch).chosen, before.chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_chosen_and_rejected_negates_the_delta(family: str) -> None:
    # Equal up to rounding only: chosen and rejected are then in other rows of the same matrix products.
    policy = shared_policy(family)
    encoded = encoded_rows(family)
    swapped = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in encoded]
    with torch.no_grad():
        both_orders = []
        for order in (encoded, swapped):
            batch = policy.collate(order)
            reference = adapter_off(policy)(policy.model, batch)
            log_probs = policy.log_probs(policy.model, batch)
            both_orders.append((deltas(log_probs, reference), log_probs))
    (delta, log_probs), (swapped_delta, swapped_log_probs) = both_orders
    assert (
        largest_difference(log_probs.chosen, swapped_log_probs.rejected) < 1e-6
        and largest_difference(log_probs.rejected, swapped_log_probs.chosen) < 1e-6
    )
    torch.testing.assert_close(delta, -swapped_delta, rtol=1e-5, atol=5e-5)
    assert delta.abs().min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_do_not_depend_on_the_batch(family: str) -> None:
    policy = shared_policy(family)
    encoded = encoded_rows(family)
    with torch.no_grad():
        batched = policy.log_probs(policy.model, policy.collate(encoded))
        reversed_rows = policy.log_probs(policy.model, policy.collate(encoded[::-1]))
        single = [policy.log_probs(policy.model, policy.collate([row])) for row in encoded]
    for side in ("chosen", "rejected"):
        assert largest_difference(getattr(reversed_rows, side).flip(0), getattr(batched, side)) < 1e-5
        assert (
            largest_difference(torch.cat([getattr(log_probs, side) for log_probs in single]), getattr(batched, side))
            < 1e-5
        )


class Separate(NamedTuple):
    """Encoded rows of a family, and log-probs and gradients of two separate forward passes without checkpointing."""

    rows: list[dict[str, Any]]
    log_probs: LogProbs
    gradients: Tensor


@functools.cache
def separate_passes(family: str) -> Separate:
    policy = shared_policy(family)
    encoded = encoded_rows(family)
    policy.model.train()
    log_probs = separate_forward_passes(policy, encoded)
    separate = Separate(encoded, log_probs.detach(), gradients(policy, log_probs))
    policy.model.eval()
    return separate


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefix_equals_two_separate_forward_passes(family: str, checkpointing: bool) -> None:
    encoded, expected, expected_gradients = separate_passes(family)
    policy = checkpointing_policy(family) if checkpointing else shared_policy(family)
    lengths = {(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in encoded}
    assert len(lengths) == 3 and all(chosen != rejected for chosen, rejected in lengths)
    policy.model.train()
    log_probs = policy.log_probs(policy.model, policy.collate(encoded))
    computed = gradients(policy, log_probs)
    policy.model.eval()
    assert policy.token_log_probs.layout == "shared_prefix"
    assert_log_probs_close(log_probs, expected, 1e-5)
    assert_gradients_close(computed, expected_gradients, 1e-5)
    assert log_probs.num_tokens_chosen.tolist() == [len(row["chosen_ids"]) for row in encoded]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_get_the_gradients_of_separate_forward_passes(family: str) -> None:
    policy = fully_tuned_policy(family)
    encoded = encoded_rows(family)
    expected_gradients = gradients(policy, separate_forward_passes(policy, encoded))
    batch = policy.collate(encoded)
    log_probs = policy.log_probs(policy.model, batch)
    assert "features" not in batch
    assert_gradients_close(gradients(policy, log_probs), expected_gradients, 1e-5)


def test_shared_prefix_without_padding_equals_separate_forward_passes() -> None:
    policy = policy_of("llava")
    encoded = policy.encode(rows("llava", (1,)))
    batch = policy.collate(encoded)
    assert not batch["layout"].has_padding
    expected = separate_forward_passes(policy, encoded)
    log_probs = policy.log_probs(policy.model, batch)
    assert_log_probs_close(log_probs, expected, 1e-5)
    assert_gradients_close(
        gradients(policy, log_probs), gradients(policy, separate_forward_passes(policy, encoded)), 1e-5
    )


def test_completion_of_one_token_gives_the_right_log_prob() -> None:
    policy = policy_of("qwen2_5_vl")
    encoded = [{**row, "chosen_ids": row["chosen_ids"][:1]} for row in policy.encode(rows("qwen2_5_vl", (1, 2)))]
    assert_log_probs_close(
        policy.log_probs(policy.model, policy.collate(encoded)), separate_forward_passes(policy, encoded), 1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_sequences_give_the_same_log_probs_with_left_and_right_padding(family: str) -> None:
    policy = shared_policy(family)
    batch = batch_of(policy, family)
    chosen = batch["layout"].chosen
    with torch.no_grad():
        log_probs = policy.log_probs(policy.model, batch)
        for side in ("left", "right"):
            separate = separate_log_probs(policy.model, batch, head=policy.token_log_probs.head, padding_side=side)
            assert largest_difference(log_probs.chosen, separate[:, :chosen].sum(1)) < 1e-5
            assert largest_difference(log_probs.rejected, separate[:, chosen:].sum(1)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast_gives_close_log_probs(family: str) -> None:
    # bf16 has 8 significant bits. Its rounding is 2 % of a log-prob, as large as for separate sequences.
    policy = shared_policy(family)
    encoded, expected, _ = separate_passes(family)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        log_probs = policy.log_probs(policy.model, policy.collate(encoded))
    assert policy.token_log_probs.layout == "shared_prefix" and log_probs.chosen.dtype == torch.float32
    assert_log_probs_close(log_probs, expected, 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_gives_the_same_outputs_in_upstream_classes(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = shared_policy(family)
    policy.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    upstream = PeftModel.from_pretrained(build(family)[0], str(tmp_path)).eval()
    row = rows(family, (1 if family in IMAGES else 0,))[0]
    prompt = policy.encoder.prompt(row["images"], row["prompt"], label="here")
    inputs = {"input_ids": prompt["ids"][None], **{k: v[None] for k, v in prompt["types"].items()}, **prompt["images"]}
    with torch.no_grad():
        torch.testing.assert_close(upstream(**inputs).logits, policy.model(**inputs).logits, rtol=1e-5, atol=1e-5)
        tokens = upstream.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(prompt["ids"]) :]
    response = policy.generate([row["images"]], [row["prompt"]], max_new_tokens=8, do_sample=False)[0]
    assert response.text == policy.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
    loaded = policy_of(family, trained=False)
    loaded.load_weights(tmp_path)
    batch = batch_of(policy, family)
    with torch.no_grad():
        log_probs = [policy.log_probs(model, batch).chosen for model in (loaded.model, policy.model)]
    assert torch.equal(*log_probs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_raise_the_delta_with_and_without_checkpointing(family: str) -> None:
    curves = []
    for policy, steps in ((shared_policy(family), 10), (checkpointing_policy(family), 4)):
        batch = policy.collate(encoded_rows(family)[:1])
        policy.model.train()
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        optimizer, curve = torch.optim.AdamW(trained, lr=5e-3), []
        with fresh_adapter(policy):
            reference_log_probs = adapter_off(policy)(policy.model, batch)
            for _ in range(steps):
                log_probs = policy.log_probs(policy.model, batch)
                curve.append(float(deltas(log_probs, reference_log_probs).detach()))
                optimizer.zero_grad()
                sigmoid(log_probs, reference_log_probs, beta=0.1).mean().backward()
                optimizer.step()
        policy.model.eval()
        curves.append(torch.tensor(curve))
    assert curves[0][0] == 0 and (curves[0].diff() > 0).all() and curves[0][-1] > 1
    torch.testing.assert_close(curves[0][:4], curves[1], rtol=1e-3, atol=1e-3)


# The language-model head


def test_lm_head_in_chunks_gives_the_same_log_probs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llava", tuning="full")
    batch = batch_of(policy, "llava")
    log_probs = policy.log_probs(policy.model, batch)
    expected_gradients = gradients(policy, log_probs)
    monkeypatch.setattr(token_log_probs, "HEAD_ELEMENTS", 16 * len(policy.encoder.tokenizer))
    head_rows = []
    upstream_linear = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        head_rows.append(x.shape[0] if weight is policy.base_model.get_output_embeddings().weight else 0)
        return upstream_linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    chunked = policy.log_probs(policy.model, batch)
    assert_gradients_close(gradients(policy, chunked), expected_gradients, 1e-5)
    assert_log_probs_close(chunked, log_probs, 1e-6)
    assert max(head_rows) == 16


def test_soft_capped_text_model_gives_the_right_log_probs() -> None:
    policy = policy_of("gemma2")
    encoded = policy.encode(rows("gemma2", (0, 0, 0)))
    expected = separate_forward_passes(policy, encoded)
    expected_gradients = gradients(policy, expected)
    log_probs = policy.log_probs(policy.model, policy.collate(encoded))
    assert (policy.token_log_probs.head, policy.token_log_probs.layout) == ("finished", "shared_prefix")
    assert_log_probs_close(log_probs, expected, 1e-5)
    assert_gradients_close(gradients(policy, log_probs), expected_gradients, 1e-5)


def test_custom_lm_head_computes_all_logits(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama")
    model = policy.base_model
    upstream_forward = model.forward

    def forward(*arguments: Any, **rest: Any) -> Any:
        output = upstream_forward(*arguments, **rest)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    encoded = policy.encode(rows("llama", (0, 0)))
    log_probs = policy.log_probs(policy.model, policy.collate(encoded))
    assert_log_probs_close(log_probs, separate_forward_passes(policy, encoded), 1e-5)
    assert policy.token_log_probs.head == "own" and "in an unknown way" in caplog.text


# Layers with a state


STATEFUL = ("lfm2_vl", "qwen3_5", "qwen3_next")
"""Models with a short convolution, and with a gated delta net, which has a convolution and a recurrent state."""


@pytest.mark.parametrize("model", STATEFUL)
def test_chosen_and_rejected_start_from_the_state_after_the_prompt(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both completions of the first row have one token. The kernel of generation, without gradient, must not run."""
    policy = policy_of(model)
    upstream = sys.modules[type(policy.base_model.get_decoder().layers[0]).__module__]
    monkeypatch.delattr(upstream, "causal_conv1d_update")
    images = images_per_row(model)[:2] if model in IMAGES else (0, 0)
    encoded = policy.encode(rows(model, images))
    encoded[0] |= {f"{side}_ids": encoded[0][f"{side}_ids"][:1] for side in ("chosen", "rejected")}
    for some in (encoded[:1], encoded):
        expected = separate_forward_passes(policy, some)
        expected_gradients = gradients(policy, expected)
        log_probs = policy.log_probs(policy.model, policy.collate(some))
        assert policy.token_log_probs.layout == "shared_prefix"
        assert_log_probs_close(log_probs, expected, 1e-5)
        assert_gradients_close(gradients(policy, log_probs), expected_gradients, 1e-5)


@pytest.mark.parametrize("model", STATEFUL)
def test_nothing_flows_from_chosen_to_rejected(model: str) -> None:
    policy = policy_of(model)
    batch = policy.collate(policy.encode(rows(model, (0, 0))))
    policy.log_probs(policy.model, batch)
    embeddings: list[Tensor] = []
    policy.base_model.get_input_embeddings().register_forward_hook(lambda _, __, output: embeddings.append(output))
    policy.base_model.get_input_embeddings().weight.requires_grad_(True)
    log_probs = policy.log_probs(policy.model, batch)
    layout = batch["layout"]
    (of_rejected,) = torch.autograd.grad(log_probs.rejected.sum(), embeddings[-1], retain_graph=True)
    (of_chosen,) = torch.autograd.grad(log_probs.chosen.sum(), embeddings[-1])
    prompt, chosen, rejected = of_rejected.abs().amax((0, 2)).split([layout.prompt, layout.chosen, layout.rejected])
    assert policy.token_log_probs.layout == "shared_prefix"
    assert chosen.max() == 0 and prompt.min() > 0 and rejected.max() > 0
    assert of_chosen[:, layout.rejected_start :].abs().max() == 0


@pytest.mark.parametrize("detected_by", ["layer types", "the check"])
def test_state_that_is_not_shared_falls_back_to_separate_sequences_and_warns_once(
    detected_by: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = set() if detected_by == "layer types" else {0}
    monkeypatch.setattr(shared_prefix, "share_states", lambda decoder: layers)
    policy = policy_of("qwen3_next")
    encoded = policy.encode(rows("qwen3_next", (0, 0, 0)))
    with caplog.at_level(logging.WARNING):
        expected = separate_forward_passes(policy, encoded)
        expected_gradients = gradients(policy, expected)
        for _ in range(2):
            log_probs = policy.log_probs(policy.model, policy.collate(encoded))
    warnings = [record for record in caplog.records if "two separate sequences" in record.message]
    assert policy.token_log_probs.layout == "separate" and len(warnings) == 1
    assert ("linear_attention layers" in warnings[0].message) == (detected_by == "layer types")
    assert_log_probs_close(log_probs, expected, 1e-5)
    assert_gradients_close(gradients(policy, log_probs), expected_gradients, 1e-5)


# The check of the first batch


def mask_that_shows_chosen(mask: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """A wrong mask, in which the rejected tokens attend to the chosen ones."""
    return lambda b, h, q, k: mask(
        b, h, q - layout.chosen * (q >= layout.rejected_start), k - layout.chosen * (k >= layout.rejected_start)
    )


def attend_in_one_call(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Attention in one call with the whole mask."""
    return lambda *arguments, prefix_layout=None, **rest: attend(*arguments, **rest)


def positions_after_chosen(layout: Any, device: Any) -> Tensor:
    """Wrong positions, in which the rejected tokens continue after the chosen ones."""
    return torch.arange(layout.total, device=device).clamp(max=layout.prompt + max(layout.chosen, layout.rejected) - 1)


@pytest.mark.parametrize(
    ("wrong", "half_precision"),
    [(wrong, half) for wrong in ("mask", "positions") for half in ("no", "autocast", "weights")],
)
def test_wrong_shared_prefix_fails_the_check(wrong: str, half_precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "mask":
        monkeypatch.setattr(shared_prefix, "mask_chosen_from_rejected", mask_that_shows_chosen)
        monkeypatch.setattr(shared_prefix, "_attention", attend_in_one_call)
    else:
        monkeypatch.setattr(shared_prefix.Layout, "logical_positions", positions_after_chosen)
    policy = policy_of("llava")
    policy.model.to(torch.bfloat16 if half_precision == "weights" else torch.float32)
    batch = batch_of(policy, "llava")
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision == "autocast"), torch.no_grad():
        policy.log_probs(policy.model, batch)
    assert policy.token_log_probs.layout == "separate"
    strict_policy = policy_of("llava", options={"pair_layout": "shared_prefix"})
    with pytest.raises(ValueError, match="pair_layout 'shared_prefix' is not exact"):
        strict_policy.log_probs(strict_policy.model, batch_of(strict_policy, "llava"))


def test_check_runs_in_float32_inside_a_wrapper_that_casts() -> None:
    policy = policy_of("qwen2_5_vl", trained=False)
    model, dtypes = policy.base_model, []
    model._original_forward = model.forward

    def forward(*arguments: Any, **rest: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model._original_forward(*arguments, **rest)

    model.forward = forward
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    linear = model.get_decoder().layers[0].mlp.down_proj
    linear.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    policy.token_log_probs.check(policy.model, batch_of(policy, "qwen2_5_vl"))
    assert (
        policy.token_log_probs.layout == "shared_prefix" and set(dtypes) == {torch.float32} and model.forward is forward
    )
    policy.log_probs(policy.model, batch_of(policy, "qwen2_5_vl"))
    assert torch.bfloat16 in dtypes


# Cached vision features


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_give_the_log_probs_of_pixels_and_the_tower_runs_once(
    family: str, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = shared_policy(family)
    encoded = encoded_rows(family)
    if family not in IMAGES:
        record_property("reason", "text-only: it has no vision features, and the rows are unchanged")
        assert policy.cache_vision_features(encoded) == encoded
        return
    calls = []
    upstream_features = policy.base_model.get_image_features

    def count_call(*arguments: Any, **rest: Any) -> Any:
        calls.append(1)
        return upstream_features(*arguments, **rest)

    monkeypatch.setattr(policy.base_model, "get_image_features", count_call)
    policy.log_probs(policy.model, policy.collate(encoded))
    calls.clear()
    batch = policy.collate(encoded)
    reference, log_probs = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert len(calls) == 1 and not torch.equal(reference.chosen, log_probs.chosen)
    cached = policy.cache_vision_features(encoded)
    assert all("pixel_values" not in row["images"] for row in cached)
    calls.clear()
    assert_log_probs_close(policy.log_probs(policy.model, policy.collate(cached)), log_probs, 1e-5)
    assert not calls


def test_caching_features_of_a_trained_tower_raises() -> None:
    policy = policy_of("llava", options={"train_vision_tower": True}, tuning="full")
    with pytest.raises(ValueError, match="vision tower trains"):
        policy.cache_vision_features(policy.encode(rows("llava", (1,))))


# Trainable parameters, rows, responses


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_parameters_are_those_of_the_settings(family: str) -> None:
    def trains_vision(model: nn.Module) -> bool:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return any(part in name for name in names for part in ("vision", "visual", "projector", "connector"))

    policy = shared_policy(family)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not trains_vision(policy.model)
    assert not any("lm_head" in name for name in trained)
    assert not trains_vision(policy_of(family, tuning="full").model)
    if family in IMAGES:
        assert trains_vision(policy_of(family, options={"train_vision_tower": True}).model)
        assert trains_vision(fully_tuned_policy(family).model)
    with pytest.raises(ValueError, match="lora_targets: 'to_q'"):
        lora_targets(build(family)[0], ("to_q",), train_vision_tower=False)


def test_fully_tuned_model_is_saved_with_its_processor_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = save("llava", tmp_path / "base")
    policy = VisionLanguage.load(source, device="cpu")
    policy.prepare(config(tuning="full"))
    batch = batch_of(policy, "llava")
    before = policy.log_probs(policy.model, batch).detach()
    for parameter in policy.base_model.get_decoder().parameters():
        parameter.data.mul_(1.02)
    policy.save(tmp_path / "tuned")
    assert "dpo_mm" not in (tmp_path / "tuned" / "config.json").read_text()
    upstream = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    assert AutoProcessor.from_pretrained(tmp_path / "tuned").chat_template
    expected = policy.log_probs(policy.model, batch)
    assert (
        torch.equal(policy.log_probs(upstream, batch).chosen, expected.chosen)
        and largest_difference(before.chosen, expected.chosen) > 1e-4
    )
    loaded = VisionLanguage.load(source, device="cpu")
    loaded.prepare(config(tuning="full"))
    loaded.load_weights(tmp_path / "tuned")
    assert torch.equal(loaded.log_probs(loaded.model, batch).chosen, expected.chosen)
    loaded.load_adapter(tmp_path / "tuned")
    with pytest.raises(ValueError, match="needs a LoRA"), loaded.adapter_off():
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_is_the_text_that_the_template_adds_after_the_prompt(family: str) -> None:
    policy = shared_policy(family)
    row = rows(family, (1 if family in IMAGES else 0,))[0]
    encoded = policy.encode([row])[0]
    tokenizer = policy.encoder.tokenizer
    assert tokenizer.decode(encoded["chosen_ids"]) == row["chosen"][0]["content"][0]["text"] + "</s>"
    assert tokenizer.decode(encoded["prompt_ids"]).count("<s>") == 1
    prompt = row["prompt"][0]["content"][0]["text"]
    assert prompt in tokenizer.decode(encoded["prompt_ids"])
    stops = policy.base_model.generation_config.eos_token_id
    assert encoded["chosen_ids"][-1] in ([stops] if isinstance(stops, int) else stops)
    truncated = policy.encode([{**row, "rejected_truncated": True}])[0]
    assert tokenizer.decode(truncated["rejected_ids"]) == row["rejected"][0]["content"][0]["text"]


def test_row_that_the_processor_rejects_is_named_in_the_error() -> None:
    policy = VisionLanguage(*build("paligemma"), "m")
    with pytest.raises(ValueError, match="row paligemma-0: the processor failed: `images` are expected"):
        policy.encode(rows("paligemma", (0,)))


def test_overlong_rows_are_named_and_raise_or_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    some = rows("llava", (1, 4, 1))
    with pytest.raises(
        ValueError, match=r"row llava-1: .* 4 images. At most 64 fit, and image tokens are never truncated"
    ):
        VisionLanguage(*build("llava"), "m", max_length=64).encode(some)
    policy = VisionLanguage(*build("llava"), "m", max_length=64, overlong_rows="drop")
    assert [row["id"] for row in policy.encode(some)] == ["llava-0", "llava-2"]
    assert policy.encoder.dropped == ["llava-1"] and "row llava-1" in caplog.text
    two_images = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}]}]
    with pytest.raises(ValueError, match="row llava-0: 1 images for 2 placeholders"):
        policy.encode([{**some[0], "prompt": two_images}])
    with pytest.raises(ValueError, match="row llava-0: 1 images for a model that takes only text"):
        VisionLanguage(*build("llama"), "m").encode(some[:1])
    with pytest.raises(ValueError, match="overlong_rows 'cut' is unknown"):
        VisionLanguage(*build("llama"), "m", overlong_rows="cut")


def test_columns_of_the_dataset_reach_the_batch() -> None:
    policy = VisionLanguage(*build("llama"), "m")
    some = [{**row, "score_gap": 0.5 * n, "probability": 0.9} for n, row in enumerate(rows("llama", (0, 0)))]
    batch = policy.collate([{**row, "visit": 3, "reference_chosen": 1.0} for row in policy.encode(some)])
    assert batch["score_margin"].tolist() == [0, 0.5] and batch["reference_chosen"].tolist() == [1, 1]
    assert batch["id"] == ["llama-0", "llama-1"] and batch["probability"].shape == (2,)


def test_encoder_decoder_is_named_in_the_error(tmp_path: Path) -> None:
    from transformers import Florence2Config, T5Config

    for name, kind in (("t5", T5Config(vocab_size=8)), ("florence2", Florence2Config())):
        kind.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"is a {name}, an encoder-decoder"):
            VisionLanguage.load(str(tmp_path / name))
    with pytest.raises(ValueError, match="cannot be loaded"):
        VisionLanguage.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_do_not_depend_on_the_batch(family: str) -> None:
    policy = shared_policy(family)
    examples = rows(family, images_per_row(family))
    images, prompts = [row["images"] for row in examples], [row["prompt"] for row in examples]
    batched = policy.generate(images, prompts, max_new_tokens=6, do_sample=False)
    single = policy.generate(images, prompts, max_new_tokens=6, do_sample=False, batch_size=1)
    assert batched == single and len(batched) == 3
    assert all(response.tokens <= 6 and (response.tokens == 6 or not response.hit_limit) for response in batched)


class EndAfter(StoppingCriteria):
    """Ends row n of a batch after the n-th of these numbers of tokens."""

    def __init__(self, prompt: int, tokens: list[int]) -> None:
        self.ends = prompt + torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        return input_ids.shape[1] >= self.ends


@pytest.mark.parametrize("family", (*FAMILIES, *SPECIAL_TEXT_MODELS))
def test_one_prefill_and_dropped_rows_give_the_tokens_of_upstream_generate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decodings side by side, then one on a copy. Catches rows that are mixed up, a cache that is used twice, and other noise."""
    monkeypatch.setattr("dpo_mm.policies.vlm.batch_decoding._cache_bytes", lambda *a: SIDE_BY_SIDE // 2)
    policy = shared_policy(family)
    encoded = encoded_rows(family)
    prompts = [{"ids": row["prompt_ids"], "types": row["types"], "images": row["images"]} for row in encoded]
    inputs, limits = batch_inputs(policy, prompts), generation_limits(policy, max_new_tokens=4)
    prompt, tokens = inputs["input_ids"].shape[1], [3, 1, 4]
    decodings = [Decoding(0.0, 0), Decoding(0.7, 3), Decoding(0.7, 4)]
    stops, passes = [EndAfter(prompt, tokens) for _ in decodings], []

    def count_rows(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        states = options["input_ids"] if options.get("inputs_embeds") is None else options["inputs_embeds"]
        passes.append(states.shape[:2])

    hook = policy.base_model.get_decoder().register_forward_pre_hook(count_rows, with_kwargs=True)
    results = decode_batch(policy.base_model, inputs, decodings, stops=stops, **limits)
    hook.remove()
    # one prefill, and not always 6 and 3 rows
    assert passes == [(3, prompt), (4, 1), (4, 1), (2, 1), (2, 1), (2, 1), (1, 1)]
    for decoding, result in zip(decodings, results, strict=True):
        torch.manual_seed(decoding.seed)
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0} if decoding.temperature else {}
        with_stop = {**limits, "do_sample": False, **sampling, "stopping_criteria": [EndAfter(prompt, tokens)]}
        upstream = policy.base_model.generate(**inputs, **with_stop)
        for row, end in enumerate(tokens):
            ends = slice(prompt, prompt + end)
            assert result[row, ends].tolist() == upstream[row, ends].tolist()


def test_sampled_responses_depend_only_on_the_seed() -> None:
    policy = shared_policy("llava")
    examples = rows("llava", images_per_row("llava"))
    images, prompts = [row["images"] for row in examples], [row["prompt"] for row in examples]
    state = torch.get_rng_state()
    sampled = [policy.generate(images, prompts, max_new_tokens=6, do_sample=True, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] and torch.equal(state, torch.get_rng_state())


def test_response_records_that_it_hit_the_limit() -> None:
    policy = VisionLanguage(*build("llama"), "m")
    response = policy.encoder.response
    assert response([5, 6, 2, 0, 0])[1:] == (3, False) and response([5, 6, 7])[1:] == (3, True)


def test_fingerprint_depends_on_weights_and_template() -> None:
    one, other = (VisionLanguage(*build("llama"), "m") for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    other.processor.chat_template += " "
    assert one.fingerprint() != other.fingerprint()
    other = VisionLanguage(*build("llama", seed=1), "m")
    assert one.fingerprint() != other.fingerprint()
