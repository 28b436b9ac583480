"""Greedy responses are the argmax of the policy, and their text is what the model wrote."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch

from dpo_mm.data.schema import Response
from dpo_mm.policies.vlm.decoding import hidden_ids
from dpo_mm.policies.vlm.generation import stream_response
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.contracts import tiny_vlms

PROMPTS = ["describe the picture", "a red square", "three small circles"]
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "num_beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True},
    "suppress_tokens": {"suppress_tokens": list(range(40, 300))},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(40, 300)]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "stop_strings": {"stop_strings": ["e", "of the"]},
    "typical_p": {"typical_p": 0.2, "min_p": 0.5, "epsilon_cutoff": 0.1},
    "min_new_tokens": {"min_new_tokens": 9, "max_length": 3},
    "guidance_scale": {"guidance_scale": 3.0},
}


def policy_with(**settings: Any) -> VisionLanguage:
    """A tiny Llama with sharp probabilities and these entries in its generation config."""
    model, tokenizer = tiny_vlms.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return VisionLanguage(model, tokenizer, "tiny")


def responses(policy: VisionLanguage, **options: Any) -> list[Response]:
    return policy.generate([[]] * 3, PROMPTS, max_new_tokens=8, **{"do_sample": False, **options})


@functools.cache
def plain(do_sample: bool) -> list[Response]:
    return responses(policy_with(), do_sample=do_sample, seed=3)


def test_greedy_responses_are_the_argmax_of_the_policy() -> None:
    policy = policy_with(repetition_penalty=1.5)
    for prompt, response in zip(PROMPTS, responses(policy), strict=True):
        ids = policy.encoder.prompt([], [{"role": "user", "content": [{"type": "text", "text": prompt}]}], label="")[
            "ids"
        ]
        start = len(ids)
        while len(ids) < start + 8 and 2 not in ids[start:]:
            with torch.no_grad():
                ids = torch.cat([ids, policy.base_model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
        assert response == policy.encoder.response(ids[start:].tolist())


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "stop_strings"])
def test_generation_config_does_not_change_the_responses(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation that it catches: `generate` fills what is not set from the model's generation config."""
    policy = policy_with(**SETTINGS[name])
    before = policy.base_model.generation_config.to_dict()
    with caplog.at_level(logging.WARNING):
        assert responses(policy) == plain(False)
    assert responses(policy, do_sample=True, seed=3) == plain(True)
    assert [f"{name} " in record.getMessage() for record in caplog.records if record.name.startswith("dpo_mm")] == [
        True
    ]
    assert policy.base_model.generation_config.to_dict() == before


def test_stop_string_of_one_token_ends_a_response_and_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_with(**SETTINGS["stop_strings"])
    stop = policy.encoder.tokenizer.convert_tokens_to_ids("e")
    assert policy.encoder.stops == [2, stop]
    assert policy.encoder.response([50, stop, 51])[1:] == (2, False)
    responses(policy)
    assert "'of the'" in caplog.text and "'e'" not in caplog.text


def test_special_tokens_that_a_model_writes_are_part_of_its_text() -> None:
    """Mutation that it catches: `skip_special_tokens`, which removes the box from the mined response."""
    model, processor = tiny_vlms.build("qwen2_5_vl")
    boxes = ["<|box_start|>", "<|box_end|>", "<loc0012>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": boxes})
    policy = VisionLanguage(model, processor, "tiny")
    tokenizer, image = processor.tokenizer, model.config.image_token_id
    written = tokenizer("a red square <|box_start|>(1,2)<loc0012><|box_end|>.", add_special_tokens=False)["input_ids"]
    response = policy.encoder.response([*written, tokenizer.eos_token_id, 0, 0])
    assert response.text == "a red square <|box_start|>(1,2)<loc0012><|box_end|>." and not response.hit_limit
    row = {"id": "0", "prompt": "describe", "chosen": response.text, "rejected": "a"}
    assert policy.encode([row])[0]["chosen_ids"].tolist() == [*written, tokenizer.eos_token_id]
    assert policy.encoder.response([1, image, 3, *written, 0]).text == response.text
    assert {image, model.config.video_token_id, 0, 1, 2, 3} <= hidden_ids(tokenizer, model)


def test_spaces_of_the_text_are_those_that_the_model_wrote() -> None:
    policy = policy_with()
    policy.encoder.tokenizer.clean_up_tokenization_spaces = True
    text = "a square , is n't it ?"
    assert policy.encoder.response(policy.encoder.tokenizer(text)["input_ids"]).text == text


def test_streamed_response_is_the_generated_one() -> None:
    policy = policy_with(repetition_penalty=1.5)
    policy.encoder.tokenizer.add_special_tokens({"additional_special_tokens": ["e", "s", "r", "a"]})
    assert list(stream_response(policy, [], PROMPTS[0], max_new_tokens=8))[-1] == responses(policy)[0].text
