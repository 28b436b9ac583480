"""What every vision-language family must hold (the next family adds a builder to tiny_vlms)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import LogProbs, deltas, sigmoid
from dpo_mm.policies.vlm import shared_prefix
from dpo_mm.policies.vlm import token_log_probs as token_scores
from dpo_mm.policies.vlm.chat import response_from_tokens
from dpo_mm.policies.vlm.token_log_probs import separate_log_probs
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage, lora_targets
from dpo_mm.training.reference import adapter_off, frozen_copy
from tests.contracts import tiny_vlms
from tests.contracts.tiny_vlms import IMAGES, build, rows, save

FAMILIES = tuple(sorted((*IMAGES, "llama")))
WITHOUT = ("gemma2", "qwen3_next")
"""Text-only models for what is special about them: soft caps; linear attention."""


def test_every_builder_is_a_family() -> None:
    assert sorted((*FAMILIES, *WITHOUT)) == sorted(tiny_vlms.BUILDERS) and len(FAMILIES) == 13


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", pairs="p", output_dir="o", beta=0.1, lora_rank=4, lora_alpha=8, **changes)


def counts(family: str) -> tuple[int, ...]:
    """Images a row: several where a family has them, and a row without where that is allowed."""
    if family.startswith("paligemma"):
        return (2, 1, 3)
    first = 1 if family == "llava_onevision" else 2  # which cuts a picture into tiles where it stands alone
    return (first, 0, 3) if family in IMAGES else (0, 0, 0)


def policy_of(
    family: str, *, trained: bool = True, options: dict[str, Any] | None = None, **changes: Any
) -> VisionLanguage:
    """A policy with a LoRA that already does something, unless it is to be fresh."""
    policy = VisionLanguage(*build(family), family, **(options or {}))
    policy.prepare(config(**changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if trained and "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return policy


@functools.cache
def untouched(family: str) -> VisionLanguage:
    """One policy with an adapter that does something, for tests that leave it as it is."""
    return policy_of(family)


def batch_of(policy: VisionLanguage, family: str, seed: int = 0) -> dict[str, Any]:
    return policy.collate(policy.encode(rows(family, counts(family), seed)))


def plainly(policy: VisionLanguage, row: dict[str, Any], side: str) -> Tensor:
    """log p of one completion by the stock model's own forward on one unpadded sequence, all its logits."""
    prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
    kind = 1 if policy.base_model.config.model_type == "paligemma" else 0  # PaliGemma 2's too
    types = {k: torch.cat([v, torch.full_like(answer, kind)])[None] for k, v in row["types"].items()}
    logits = policy.model(input_ids=torch.cat([prompt, answer])[None], use_cache=False, **types, **row["images"]).logits
    found = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return found.gather(1, answer[:, None]).sum()


def two_plain_forwards(policy: VisionLanguage, encoded: list[dict[str, Any]]) -> LogProbs:
    chosen, rejected = (torch.stack([plainly(policy, row, side) for row in encoded]) for side in ("chosen", "rejected"))
    ones = torch.ones_like(chosen)
    return LogProbs(chosen, rejected, ones, ones, is_likelihood=True)


def gradients(policy: VisionLanguage, found: LogProbs) -> Tensor:
    """All gradients of a loss that sees every log-prob, as one vector."""
    policy.model.zero_grad(set_to_none=True)
    weights = torch.linspace(0.5, 1.5, len(found.chosen))
    (weights * (found.chosen - 0.7 * found.rejected)).mean().backward()
    parts = [
        p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
        for p in policy.model.parameters()
        if p.requires_grad
    ]
    return torch.cat(parts)


def apart(found: Tensor, truth: Tensor) -> float:
    """The largest relative difference of log-probs."""
    return float(((found - truth).abs() / truth.abs().clamp(min=1)).max().detach())


def same(found: LogProbs, truth: LogProbs, tolerance: float) -> None:
    assert apart(found.chosen, truth.chosen) < tolerance and apart(found.rejected, truth.rejected) < tolerance


def near(found: Tensor, truth: Tensor, tolerance: float) -> None:
    assert float((found - truth).norm() / truth.norm()) < tolerance and float(truth.norm()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_is_the_reference_whatever_would_drop_out(family: str, record_property: Any) -> None:
    model, processor = build(family)
    record_property("of", type(model).__name__)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.5)
    model.get_decoder().layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    policy = VisionLanguage(model, processor, family)
    policy.prepare(config())
    batch = batch_of(policy, family)
    policy.model.train()
    reference = adapter_off(policy)(policy.model, batch)
    found = policy.log_probs(policy.model, batch)
    assert torch.equal(found.chosen, reference.chosen) and torch.equal(found.rejected, reference.rejected)
    assert torch.equal(sigmoid(found, reference, beta=0.1), torch.full((3,), math.log(2)))
    assert policy.scorer.layout == "shared_prefix" and found.is_likelihood and found.chosen.requires_grad
    policy.model.eval()
    assert torch.equal(policy.log_probs(policy.model, batch_of(policy, family)).chosen, found.chosen)


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
def test_a_trained_adapter_is_not_the_reference_and_a_copy_stays(family: str) -> None:
    policy = policy_of(family)
    batch = batch_of(policy, family)
    copied = frozen_copy(policy)
    before, found = copied(policy.model, batch), policy.log_probs(policy.model, batch).detach()
    assert torch.equal(before.chosen, found.chosen)
    assert apart(adapter_off(policy)(policy.model, batch).chosen, found.chosen) > 1e-3
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.1)
    assert torch.equal(copied(policy.model, batch).chosen, before.chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_the_sides_negates_the_margin(family: str) -> None:
    # To rounding, not to the bit: the sides then stand in other rows of the same matrix products.
    policy = untouched(family)
    encoded = policy.encode(rows(family, counts(family)))
    swapped = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in encoded]
    with torch.no_grad():
        both_orders = []
        for some in (encoded, swapped):
            batch = policy.collate(some)
            reference = adapter_off(policy)(policy.model, batch)
            found = policy.log_probs(policy.model, batch)
            both_orders.append((deltas(found, reference), found))
    (one, found), (other, turned) = both_orders
    assert apart(found.chosen, turned.rejected) < 1e-6 and apart(found.rejected, turned.chosen) < 1e-6
    torch.testing.assert_close(one, -other, rtol=1e-5, atol=5e-5)
    assert one.abs().min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_does_not_depend_on_its_batch(family: str) -> None:
    policy = untouched(family)
    encoded = policy.encode(rows(family, counts(family)))
    with torch.no_grad():
        together = policy.log_probs(policy.model, policy.collate(encoded))
        turned = policy.log_probs(policy.model, policy.collate(encoded[::-1]))
        alone = [policy.log_probs(policy.model, policy.collate([row])) for row in encoded]
    for side in ("chosen", "rejected"):
        assert apart(getattr(turned, side).flip(0), getattr(together, side)) < 1e-5
        assert apart(torch.cat([getattr(one, side) for one in alone]), getattr(together, side)) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefix_is_two_plain_forwards(family: str, checkpointing: bool) -> None:
    policy = policy_of(family, gradient_checkpointing=checkpointing)
    encoded = policy.encode(rows(family, counts(family)))
    lengths = {(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in encoded}
    assert len(lengths) == 3 and all(chosen != rejected for chosen, rejected in lengths)
    policy.model.train()
    truth = two_plain_forwards(policy, encoded)
    wanted = gradients(policy, truth)
    found = policy.log_probs(policy.model, policy.collate(encoded))
    assert policy.scorer.layout == "shared_prefix"
    same(found, truth, 1e-5)
    near(gradients(policy, found), wanted, 1e-5)
    assert found.num_tokens_chosen.tolist() == [len(row["chosen_ids"]) for row in encoded]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_get_the_gradients_of_plain_forwards(family: str) -> None:
    policy = policy_of(family, options={"train_vision_tower": True}, tuning="full")
    encoded = policy.encode(rows(family, counts(family)))
    wanted = gradients(policy, two_plain_forwards(policy, encoded))
    batch = policy.collate(encoded)
    found = policy.log_probs(policy.model, batch)
    assert "features" not in batch
    near(gradients(policy, found), wanted, 1e-5)


def test_no_padding_at_all_is_exact_too() -> None:
    policy = policy_of("llava")
    encoded = policy.encode(rows("llava", (1,)))
    batch = policy.collate(encoded)
    assert not batch["layout"].padded
    truth = two_plain_forwards(policy, encoded)
    found = policy.log_probs(policy.model, batch)
    same(found, truth, 1e-5)
    near(gradients(policy, found), gradients(policy, two_plain_forwards(policy, encoded)), 1e-5)


def test_a_completion_of_one_token() -> None:
    policy = policy_of("qwen2_5_vl")
    encoded = [{**row, "chosen_ids": row["chosen_ids"][:1]} for row in policy.encode(rows("qwen2_5_vl", (1, 2)))]
    same(policy.log_probs(policy.model, policy.collate(encoded)), two_plain_forwards(policy, encoded), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_sequences_agree_padded_on_either_side(family: str) -> None:
    policy = untouched(family)
    batch = batch_of(policy, family)
    chosen = batch["layout"].chosen
    with torch.no_grad():
        found = policy.log_probs(policy.model, batch)
        for side in ("left", "right"):
            plain = separate_log_probs(policy.model, batch, head=policy.scorer.head, padding_side=side)
            assert apart(found.chosen, plain[:, :chosen].sum(1)) < 1e-5
            assert apart(found.rejected, plain[:, chosen:].sum(1)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast_is_close(family: str) -> None:
    # bf16 keeps 8 bits: 2 % of a log-prob is its rounding, and the same as that of plain sequences.
    policy = untouched(family)
    encoded = policy.encode(rows(family, counts(family)))
    with torch.no_grad():
        truth = two_plain_forwards(policy, encoded)
        with torch.autocast("cpu", torch.bfloat16):
            found = policy.log_probs(policy.model, policy.collate(encoded))
    assert policy.scorer.layout == "shared_prefix" and found.chosen.dtype == torch.float32
    same(found, truth, 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_adapter_answers_in_stock_classes_as_in_memory(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = policy_of(family)
    policy.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    stock = PeftModel.from_pretrained(build(family)[0], str(tmp_path)).eval()
    row = rows(family, (1 if family in IMAGES else 0,))[0]
    prompt = policy.rows.prompt(row["images"], row["prompt"], where="here")
    inputs = {"input_ids": prompt["ids"][None], **{k: v[None] for k, v in prompt["types"].items()}, **prompt["images"]}
    with torch.no_grad():
        policy.model.eval()
        torch.testing.assert_close(stock(**inputs).logits, policy.model(**inputs).logits, rtol=1e-5, atol=1e-5)
        tokens = stock.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(prompt["ids"]) :]
    answer = policy.generate([row["images"]], [row["prompt"]], max_new_tokens=8, do_sample=False)[0]
    assert answer.text == policy.rows.tokenizer.decode(tokens, skip_special_tokens=True)
    again = policy_of(family, trained=False)
    again.load_weights(tmp_path)
    batch = batch_of(policy, family)
    assert torch.equal(again.log_probs(again.model, batch).chosen, policy.log_probs(policy.model, batch).chosen)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_raise_the_margin_with_and_without_checkpointing(family: str) -> None:
    curves = []
    for checkpointing, steps in ((False, 10), (True, 4)):
        policy = policy_of(family, trained=False, gradient_checkpointing=checkpointing)
        batch = policy.collate(policy.encode(rows(family, counts(family)))[:1])
        policy.model.train()
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        optimiser, reference, curve = torch.optim.AdamW(trained, lr=5e-3), adapter_off(policy), []
        for _ in range(steps):
            found, base = policy.log_probs(policy.model, batch), reference(policy.model, batch)
            curve.append(float(deltas(found, base).detach()))
            optimiser.zero_grad()
            sigmoid(found, base, beta=0.1).mean().backward()
            optimiser.step()
        curves.append(torch.tensor(curve))
    assert curves[0][0] == 0 and (curves[0].diff() > 0).all() and curves[0][-1] > 1
    torch.testing.assert_close(curves[0][:4], curves[1], rtol=1e-3, atol=1e-3)


# The head, features, and the check at the start


def test_the_head_in_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llava", tuning="full")
    batch = batch_of(policy, "llava")
    found = policy.log_probs(policy.model, batch)
    wanted = gradients(policy, found)
    monkeypatch.setattr(token_scores, "HEAD_ELEMENTS", 16 * len(policy.rows.tokenizer))
    widest = []
    plain = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        widest.append(x.shape[0] if weight is policy.base_model.get_output_embeddings().weight else 0)
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    again = policy.log_probs(policy.model, batch)
    near(gradients(policy, again), wanted, 1e-5)
    same(again, found, 1e-6)
    assert max(widest) == 16


def test_a_soft_capped_text_model_is_exact() -> None:
    policy = policy_of("gemma2")
    encoded = policy.encode(rows("gemma2", (0, 0, 0)))
    truth = two_plain_forwards(policy, encoded)
    wanted = gradients(policy, truth)
    found = policy.log_probs(policy.model, policy.collate(encoded))
    assert (policy.scorer.head, policy.scorer.layout) == ("finished", "shared_prefix")
    same(found, truth, 1e-5)
    near(gradients(policy, found), wanted, 1e-5)


def test_a_head_of_its_own_kind_keeps_logits_whole(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama")
    core = policy.base_model
    plain = core.forward

    def forward(*arguments: Any, **rest: Any) -> Any:
        output = plain(*arguments, **rest)
        output.logits = output.logits * 3
        return output

    core.forward = forward
    encoded = policy.encode(rows("llama", (0, 0)))
    found = policy.log_probs(policy.model, policy.collate(encoded))
    same(found, two_plain_forwards(policy, encoded), 1e-5)
    assert policy.scorer.head == "own" and "in an unknown way" in caplog.text


@pytest.mark.parametrize("found_by", ["layer types", "the check"])
def test_linear_attention_falls_back_and_says_so_once(
    found_by: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found_by == "the check":
        monkeypatch.setattr(shared_prefix, "_attends", lambda kind: True)
    policy = policy_of("qwen3_next")
    encoded = policy.encode(rows("qwen3_next", (0, 0, 0)))
    with caplog.at_level(logging.WARNING):
        truth = two_plain_forwards(policy, encoded)
        wanted = gradients(policy, truth)
        for _ in range(2):
            found = policy.log_probs(policy.model, policy.collate(encoded))
    warnings = [record for record in caplog.records if "two separate sequences" in record.message]
    assert policy.scorer.layout == "separate" and len(warnings) == 1
    assert ("linear_attention layers" in warnings[0].message) == (found_by == "layer types")
    same(found, truth, 1e-5)
    near(gradients(policy, found), wanted, 1e-5)


def seen(mask: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """A wrong mask: rejected sees chosen."""
    return lambda b, h, q, k: mask(
        b, h, q - layout.chosen * (q >= layout.rejected_start), k - layout.chosen * (k >= layout.rejected_start)
    )


def in_one_call(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that takes the mask as it is."""
    return lambda *arguments, prefix_layout=None, **rest: attend(*arguments, **rest)


def running_on(layout: Any, device: Any) -> Tensor:
    """Wrong positions: rejected goes on from chosen's end."""
    return torch.arange(layout.total, device=device).clamp(max=layout.prompt + max(layout.chosen, layout.rejected) - 1)


@pytest.mark.parametrize(
    ("wrong", "half"),
    [("mask", "no"), ("mask", "autocast"), ("mask", "weights"), ("positions", "no"), ("positions", "autocast")],
)
def test_the_check_catches_a_wrong_shared_prefix(wrong: str, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Wrong positions in half-precision weights are the one thing that rounding may hide on a random model.
    if wrong == "mask":
        monkeypatch.setattr(shared_prefix, "mask_chosen_from_rejected", seen)
        monkeypatch.setattr(shared_prefix, "_attention", in_one_call)
    else:
        monkeypatch.setattr(shared_prefix.Layout, "logical_positions", running_on)
    policy = policy_of("llava")
    policy.model.to(torch.bfloat16 if half == "weights" else torch.float32)
    batch = batch_of(policy, "llava")
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"), torch.no_grad():
        policy.log_probs(policy.model, batch)
    assert policy.scorer.layout == "separate"
    again = policy_of("llava", options={"pair_layout": "shared_prefix"})
    with pytest.raises(ValueError, match="pair_layout 'shared_prefix' is not exact"):
        again.log_probs(again.model, batch_of(again, "llava"))


def test_the_check_is_made_in_float32_under_a_wrapper_that_casts() -> None:
    policy = policy_of("qwen2_5_vl", trained=False)
    core, kinds = policy.base_model, []
    core._original_forward = core.forward

    def forward(*arguments: Any, **rest: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return core._original_forward(*arguments, **rest)

    core.forward = forward
    core.get_output_embeddings().register_forward_pre_hook(lambda _, given: kinds.append(given[0].dtype))
    wide = core.get_decoder().layers[0].mlp.down_proj
    wide.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    policy.scorer.check(policy.model, batch_of(policy, "qwen2_5_vl"))
    assert policy.scorer.layout == "shared_prefix" and set(kinds) == {torch.float32} and core.forward is forward
    policy.log_probs(policy.model, batch_of(policy, "qwen2_5_vl"))
    assert torch.bfloat16 in kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_features_answer_as_pixels_and_the_tower_is_asked_once(family: str, record_property: Any) -> None:
    policy = policy_of(family)
    encoded = policy.encode(rows(family, counts(family)))
    if family not in IMAGES:
        record_property("reason", "text alone: there are no features, and rows stay as they are")
        assert policy.cache_vision_features(encoded) == encoded
        return
    calls = []
    policy.base_model.get_image_features, plain = None, policy.base_model.get_image_features

    def counting(*arguments: Any, **rest: Any) -> Any:
        calls.append(1)
        return plain(*arguments, **rest)

    policy.base_model.get_image_features = counting
    policy.log_probs(policy.model, policy.collate(encoded))
    calls.clear()
    batch = policy.collate(encoded)
    reference, found = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert len(calls) == 1 and not torch.equal(reference.chosen, found.chosen)
    kept = policy.cache_vision_features(encoded)
    assert all("pixel_values" not in row["images"] for row in kept)
    calls.clear()
    same(policy.log_probs(policy.model, policy.collate(kept)), found, 1e-5)
    assert not calls


def test_features_of_a_tower_that_trains_are_refused() -> None:
    policy = policy_of("llava", options={"train_vision_tower": True}, tuning="full")
    with pytest.raises(ValueError, match="vision tower trains"):
        policy.cache_vision_features(policy.encode(rows("llava", (1,))))


# What trains, rows, answers


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains(family: str) -> None:
    def outside(model: nn.Module) -> bool:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return any(part in name for name in names for part in ("vision", "visual", "projector", "connector"))

    policy = policy_of(family)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not outside(policy.model)
    assert not any("lm_head" in name for name in trained)
    assert not outside(policy_of(family, tuning="full").model)
    if family in IMAGES:
        assert outside(policy_of(family, options={"train_vision_tower": True}).model)
        assert outside(policy_of(family, options={"train_vision_tower": True}, tuning="full").model)
    with pytest.raises(ValueError, match="lora_targets: 'to_q'"):
        lora_targets(build(family)[0], ("to_q",), train_vision_tower=False)


def test_full_fine_tuning_is_saved_with_its_processor_and_loads(tmp_path: Path) -> None:
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
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    assert AutoProcessor.from_pretrained(tmp_path / "tuned").chat_template
    wanted = policy.log_probs(policy.model, batch)
    assert (
        torch.equal(policy.log_probs(stock, batch).chosen, wanted.chosen) and apart(before.chosen, wanted.chosen) > 1e-4
    )
    again = VisionLanguage.load(source, device="cpu")
    again.prepare(config(tuning="full"))
    again.load_weights(tmp_path / "tuned")
    assert torch.equal(again.log_probs(again.model, batch).chosen, wanted.chosen)
    again.load_adapter(tmp_path / "tuned")
    with pytest.raises(ValueError, match="needs a LoRA"), again.adapter_off():
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_what_the_template_writes_after_the_prompt(family: str) -> None:
    policy = VisionLanguage(*build(family), family)
    row = rows(family, (1 if family in IMAGES else 0,))[0]
    encoded = policy.encode([row])[0]
    words = policy.rows.tokenizer
    assert words.decode(encoded["chosen_ids"]) == row["chosen"][0]["content"][0]["text"] + "</s>"
    assert words.decode(encoded["prompt_ids"]).count("<s>") == 1
    asked = row["prompt"][0]["content"][0]["text"]
    assert asked in words.decode(encoded["prompt_ids"])


def test_a_row_that_a_processor_does_not_take_is_named() -> None:
    policy = VisionLanguage(*build("paligemma"), "m")
    with pytest.raises(ValueError, match="row paligemma-0: the processor failed: `images` are expected"):
        policy.encode(rows("paligemma", (0,)))


def test_rows_that_do_not_fit_are_refused_or_dropped_by_name(caplog: pytest.LogCaptureFixture) -> None:
    some = rows("llava", (1, 4, 1))
    with pytest.raises(
        ValueError, match=r"row llava-1: .* 4 images. At most 64 fit, and image tokens are never truncated"
    ):
        VisionLanguage(*build("llava"), "m", max_length=64).encode(some)
    policy = VisionLanguage(*build("llava"), "m", max_length=64, overlong_rows="drop")
    assert [row["id"] for row in policy.encode(some)] == ["llava-0", "llava-2"]
    assert policy.rows.dropped == ["llava-1"] and "row llava-1" in caplog.text
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}]}]
    with pytest.raises(ValueError, match="row llava-0: 1 images for 2 placeholders"):
        policy.encode([{**some[0], "prompt": places}])
    with pytest.raises(ValueError, match="row llava-0: 1 images for a model that takes only text"):
        VisionLanguage(*build("llama"), "m").encode(some[:1])
    with pytest.raises(ValueError, match="overlong_rows 'cut' is unknown"):
        VisionLanguage(*build("llama"), "m", overlong_rows="cut")


def test_columns_of_the_data_reach_the_batch() -> None:
    policy = VisionLanguage(*build("llama"), "m")
    some = [{**row, "score_gap": 0.5 * n, "probability": 0.9} for n, row in enumerate(rows("llama", (0, 0)))]
    batch = policy.collate([{**row, "visit": 3, "reference_chosen": 1.0} for row in policy.encode(some)])
    assert batch["score_margin"].tolist() == [0, 0.5] and batch["reference_chosen"].tolist() == [1, 1]
    assert batch["id"] == ["llama-0", "llama-1"] and batch["probability"].shape == (2,)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import Florence2Config, T5Config

    for name, kind in (("t5", T5Config(vocab_size=8)), ("florence2", Florence2Config())):
        kind.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"is a {name}, an encoder-decoder"):
            VisionLanguage.load(str(tmp_path / name))
    with pytest.raises(ValueError, match="cannot be loaded"):
        VisionLanguage.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_batch(family: str) -> None:
    policy = untouched(family)
    some = rows(family, counts(family))
    images, prompts = [row["images"] for row in some], [row["prompt"] for row in some]
    together = policy.generate(images, prompts, max_new_tokens=6, do_sample=False)
    alone = policy.generate(images, prompts, max_new_tokens=6, do_sample=False, batch_size=1)
    assert together == alone and len(together) == 3
    assert all(answer.tokens <= 6 and answer.hit_limit == (answer.tokens == 6) for answer in together)


def test_sampled_answers_are_those_of_their_seed() -> None:
    policy = untouched("llava")
    some = rows("llava", counts("llava"))
    images, prompts = [row["images"] for row in some], [row["prompt"] for row in some]
    state = torch.get_rng_state()
    sampled = [policy.generate(images, prompts, max_new_tokens=6, do_sample=True, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] and torch.equal(state, torch.get_rng_state())


def test_an_answer_that_ends_says_so() -> None:
    policy = VisionLanguage(*build("llama"), "m")
    ends = policy.base_model.generation_config.eos_token_id
    said = lambda tokens: response_from_tokens(tokens, policy.rows.tokenizer, ends)
    assert said([5, 6, 2, 0, 0])[1:] == (3, False) and said([5, 6, 7])[1:] == (3, True)


def test_the_fingerprint_follows_weights_and_template() -> None:
    one, other = (VisionLanguage(*build("llama"), "m") for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    other.processor.chat_template += " "
    assert one.fingerprint() != other.fingerprint()
    other = VisionLanguage(*build("llama", seed=1), "m")
    assert one.fingerprint() != other.fingerprint()
